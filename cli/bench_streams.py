"""One request of `bench serve`, by either protocol, and what its client saw of it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..client import AsyncClient, RetryPolicy
from ..common.errors import ConfigError, InternalError, Overloaded, PilotfishError, Unavailable

_EVENT = b"data: "


@dataclass(slots=True)
class StreamTrace:
    """A request from the moment it was sent. `error` is None for an answer that came to its end."""

    start_s: float
    message_times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: PilotfishError | None = None

    def add_message(self) -> None:
        """A message with part of the answer has arrived."""
        self.message_times_s.append(time.perf_counter())

    @property
    def ttft_ms(self) -> float:
        return (self.message_times_s[0] - self.start_s) * 1e3

    @property
    def tpot_ms(self) -> float:
        """The mean over the tokens after the first; 0 where there are none."""
        span_s = self.message_times_s[-1] - self.message_times_s[0]
        return span_s * 1e3 / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0

    @property
    def gaps_ms(self) -> list[float]:
        """Between each two messages."""
        return [(later - earlier) * 1e3 for earlier, later in itertools.pairwise(self.message_times_s)]


# Sends a prompt of token ids and fills the trace. Raises PilotfishError.
RunStream = Callable[[list[int], StreamTrace], Awaitable[None]]


class Connect(Protocol):
    """Opens a connection to `address` and checks that a server answers there."""

    def __call__(self, address: str, *, output_len: int, timeout_s: float) -> AbstractAsyncContextManager[RunStream]: ...


@asynccontextmanager
async def connect_grpc(address: str, *, output_len: int, timeout_s: float) -> AsyncIterator[RunStream]:
    async with AsyncClient(address, retry=RetryPolicy(max_attempts=1), timeout_s=timeout_s) as client:

        async def run_stream(prompt: list[int], trace: StreamTrace) -> None:
            stream = client.stream_generate(prompt, max_tokens=output_len, temperature=0, ignore_eos=True)
            async with stream:
                async for delta in stream:
                    trace.add_message()
                    trace.num_tokens += len(delta.token_ids)

        await client.models()
        yield run_stream


@asynccontextmanager
async def connect_http(address: str, *, output_len: int, timeout_s: float) -> AsyncIterator[RunStream]:
    """By aiohttp, which takes little time of its own: what costs a client milliseconds is not the server's."""
    try:
        import aiohttp  # an optional extra
    except ModuleNotFoundError as error:
        raise ConfigError("--protocol http needs the aiohttp package: pip install 'pilotfish[bench]'") from error

    async def run_stream(prompt: list[int], trace: StreamTrace) -> None:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with session.post("/v1/completions", json=body) as response:
                if response.status != 200:
                    raise _error_of(response.status, await response.text())
                async for line in response.content:
                    if line.startswith(_EVENT + b"{"):  # not an empty line, nor [DONE]
                        _take_event(json.loads(line.removeprefix(_EVENT)), trace)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise InternalError(f"{type(error).__name__}: {error}") from error

    unbounded = aiohttp.TCPConnector(limit=0)  # the load, and not the client, decides how many requests there are at a time
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(f"http://{address}", connector=unbounded, timeout=timeout) as session:
        try:
            async with session.get("/v1/models", raise_for_status=True) as response:
                model = (await response.json())["data"][0]["id"]
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"no server answers at http://{address}/v1: {error}") from error
        yield run_stream


def _take_event(event: dict[str, Any], trace: StreamTrace) -> None:
    if "error" in event:
        raise InternalError(event["error"]["message"])
    if event["choices"]:
        trace.add_message()
    if event.get("usage"):
        trace.num_tokens = event["usage"]["completion_tokens"]


def _error_of(status: int, body: str) -> PilotfishError:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):  # not one of pilotfish's
        message = f"status {status}: {body[:200]}"
    return Overloaded(message) if status == 429 else InternalError(message)


CONNECTIONS: Mapping[str, Connect] = {"grpc": connect_grpc, "http": connect_http}
