"""`make demo`: two replicas of a real model on this machine, asked through the SDK and the OpenAI route, then all stopped.

Exits 0 only if every step happened; each step raises if it did not.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import openai

from ..client import Client, ReplicaState
from ..common.config import EngineConfig, FleetConfig, GatewayConfig, ModelConfig, ServeConfig
from ..common.errors import InternalError, PilotfishError
from ..models.store import resolve
from ..models.store_progress import terminal_progress
from .ray_session import ray_session
from .serve import deployed

QUESTION = "What is the capital of France? Explain gravity in one sentence."
NUM_REPLICAS = 2
TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table at the end."""

    what: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_ms: float
    total_ms: float

    @property
    def tokens_per_s(self) -> float:
        decode_ms = self.total_ms - self.ttft_ms
        return (self.completion_tokens - 1) / decode_ms * 1000 if self.completion_tokens > 1 else 0.0


def main() -> int:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    config = ServeConfig(
        model=ModelConfig(model=model),
        engine=EngineConfig(max_num_seqs=16, kv_memory_fraction=0.2),
        gateway=GatewayConfig(grpc_port=0, http_port=0),
        fleet=FleetConfig(num_replicas=NUM_REPLICAS),
    )
    try:
        with terminal_progress() as progress:
            model_path = str(resolve(model, pull_missing=True, progress=progress).path)
        start = time.monotonic()
        _say(f"Starting Ray, the controller and {NUM_REPLICAS} workers")
        with (
            ray_session(address="local", namespace="pilotfish-demo", show_logs=False),
            deployed(config, model_path=model_path) as (_, addresses),
        ):
            _say(
                f"Serving {model} after {time.monotonic() - start:.1f} s: gRPC on {addresses.grpc}, HTTP on {addresses.http}\n"
            )
            with Client(addresses.grpc, timeout_s=TIMEOUT_S) as client:
                ready = [replica.name for replica in client.status().replicas if replica.state is ReplicaState.READY]
                _require(len(ready) == NUM_REPLICAS, f"only {ready} are ready")
                rows = [_stream_chat(client, "SDK, first question", QUESTION)]
                rows += _prefix_pair("SDK", lambda what, text: _stream_chat(client, what, text), topic="trains")
            with openai.OpenAI(base_url=f"http://{addresses.http}/v1", api_key="none", timeout=TIMEOUT_S) as http:
                rows += _prefix_pair("OpenAI", lambda what, text: _stream_openai(http, model, what, text), topic="ships")
            _say("Stopping everything")
    except PilotfishError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    _print_table(rows)
    return 0


def _prefix_pair(door: str, ask, *, topic: str) -> list[Row]:  # type: ignore[no-untyped-def]
    """Two questions about one long text: the second finds the text in the prefix cache."""
    text = "\n".join(
        f"Number {i} of the {topic} leaves at {i % 24}:{i * 7 % 60:02} from platform {i % 9}." for i in range(1, 31)
    )
    first = ask(f"{door}, long text, cold", f"{text}\nWhich of the {topic} leaves first?")
    second = ask(f"{door}, same text again", f"{text}\nHow many {topic} are there?")
    _require(
        second.cached_tokens > second.prompt_tokens // 2,
        f"the second question found only {second.cached_tokens} of {second.prompt_tokens} prompt tokens in the cache",
    )
    saved_ms = first.ttft_ms - second.ttft_ms
    _say(
        f"  prefix hit: {second.cached_tokens} of {second.prompt_tokens} prompt tokens; "
        f"TTFT {first.ttft_ms:.0f} ms, then {second.ttft_ms:.0f} ms ({saved_ms:.0f} ms saved)\n"
    )
    return [first, second]


def _stream_chat(client: Client, what: str, text: str) -> Row:
    _say(f"{what}:")
    stream = client.stream_chat(text, temperature=0, max_tokens=48)
    num_pieces = 0
    for piece in stream:
        num_pieces += bool(piece.text)
        print(piece.text, end="", flush=True)
    print()
    usage = stream.completion.usage
    _require(usage is not None and num_pieces > 1, "the answer did not come in pieces")
    assert usage is not None
    return Row(
        what=what,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        ttft_ms=usage.ttft_ms,
        total_ms=usage.total_ms,
    )


def _stream_openai(http: openai.OpenAI, model: str, what: str, text: str) -> Row:
    _say(f"{what}:")
    start = time.monotonic()
    first = usage = None
    chunks = http.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=48,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic()
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()
    _require(usage is not None and first is not None, "the OpenAI route did not answer")
    assert usage is not None
    assert first is not None
    details = usage.prompt_tokens_details
    return Row(
        what=what,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        completion_tokens=usage.completion_tokens,
        ttft_ms=(first - start) * 1000,
        total_ms=(time.monotonic() - start) * 1000,
    )


def _print_table(rows: list[Row]) -> None:
    width = max(len(row.what) for row in rows)
    print(f"{'':{width}}  prompt  cached  output  TTFT ms  decode tok/s")
    for row in rows:
        print(
            f"{row.what:{width}}  {row.prompt_tokens:6}  {row.cached_tokens:6}  {row.completion_tokens:6}  "
            f"{row.ttft_ms:7.0f}  {row.tokens_per_s:12.1f}"
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InternalError(message)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
