"""An answer as it is produced, for asyncio. See text_stream.py for its twin for threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

import grpc

from ..common.errors import Cancelled, InternalError
from .attempts import Attempts
from .continuation import Continuation
from .requests import TextCall
from .results import Completion, CompletionBuilder, Delta


def is_task_cancelled() -> bool:
    """Tells a task's own cancellation from the CancelledError that gRPC raises where a call was ended by this client."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncTextStream:
    """Iterate with `async for` over the deltas of an answer; `text` and `completion` are what has arrived so far.

    The call begins with the first delta that is asked for. It ends with the answer, with an error, when the task that reads is
    cancelled, or when the stream is left: `await aclose()`, the end of an `async with` block, or the last reference to it gone;
    the server then stops working on it. Where the connection breaks, or the server's process is replaced, the answer goes on at
    the next token.

    Raises, from the iteration:
        PilotfishError: the class says what happened. What had arrived stays in `completion`.
    """

    def __init__(
        self, begin: Callable[[str, Any, float | None], Any], end: Callable[[str], None], attempts: Attempts, call: TextCall
    ) -> None:
        """`begin(method, request, timeout_s)` makes a call that returns a stream of events; `end(request_id)` aborts, from
        any thread."""
        self._begin = begin
        self._end = end
        self._attempts = attempts
        self._builder = CompletionBuilder(num_choices=call.num_choices)
        self._continuation = Continuation(call.method, call.request, self._builder)
        self._deltas: deque[Delta] = deque()  # arrived and not handed out
        self._is_closed = False
        self._is_refused = False  # the server ended it with an error
        self._call: Any = None

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._deltas:
            events = await self._next_events()
            if events is not None:
                self._deltas.extend(self._builder.add(events))
        return self._deltas.popleft()

    async def _next_events(self) -> Any:
        """The next message, or None where the call failed and another is due."""
        if self._is_closed:
            raise Cancelled("the stream was closed")
        try:
            if self._call is None:
                self._call = self._begin(*self._continuation.next(), self._attempts.remaining_s())
            events = await self._call.read()
        except asyncio.CancelledError:
            if is_task_cancelled():
                self._leave()
                raise
            raise Cancelled("the call was ended by this client") from None
        except grpc.RpcError as failure:
            self._is_refused = True
            delay_s = self._attempts.delay_before_next(failure, self._continuation, answering=self._builder.has_delta)
            self._is_refused = False
            await asyncio.sleep(delay_s)
            self._call = None
            return None
        self._attempts.progressed()
        if events is grpc.aio.EOF:
            if not self._builder.is_whole:
                raise InternalError(f"the server ended request {self.request_id} before its answer was complete")
            raise StopAsyncIteration
        return events

    @property
    def request_id(self) -> str:
        """The server's name for the request; empty before the first event."""
        return self._builder.request_id

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._builder.text()

    @property
    def completion(self) -> Completion:
        return self._builder.build()

    async def read_all(self) -> Completion:
        """Read to the end; returns the whole answer."""
        async for _ in self:
            pass
        return self.completion

    async def aclose(self) -> None:
        """End the call if it has not ended. A task that waits for the next delta gets Cancelled."""
        self._leave()

    def __del__(self) -> None:
        if self._call is not None and not self._call.done():  # gRPC itself keeps a running call alive
            self._leave()

    def _leave(self) -> None:
        was_closed, self._is_closed = self._is_closed, True
        self._deltas.clear()
        if self._call is not None:
            if not (was_closed or self._is_refused or self._builder.is_whole):
                self._end(self._continuation.request_id)
            self._call.cancel()

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
