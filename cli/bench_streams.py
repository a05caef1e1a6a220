"""One request of `bench serve`, by either protocol, and what its client saw of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ..client import AsyncClient, RetryPolicy
from ..common.errors import ConfigError, InternalError, Overloaded, PilotfishError, Unavailable


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
    try:
        import openai  # an optional extra
    except ModuleNotFoundError as error:
        raise ConfigError("--protocol http needs the openai package: pip install 'pilotfish[bench]'") from error

    client = openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=timeout_s)

    async def run_stream(prompt: list[int], trace: StreamTrace) -> None:
        try:
            stream = await client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=output_len,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async with stream:
                async for chunk in stream:
                    if chunk.choices:
                        trace.add_message()
                    if chunk.usage is not None:
                        trace.num_tokens = chunk.usage.completion_tokens
        except openai.RateLimitError as error:
            raise Overloaded(error.message) from error
        except openai.OpenAIError as error:
            raise InternalError(str(error)) from error

    async with client:
        try:
            model = (await client.models.list()).data[0].id
        except openai.OpenAIError as error:
            raise Unavailable(f"no server answers at http://{address}/v1: {error}") from error
        yield run_stream


CONNECTIONS: Mapping[str, Connect] = {"grpc": connect_grpc, "http": connect_http}
