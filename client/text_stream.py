"""An answer as it is produced, for threads. See async_text_stream.py for its asyncio twin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import grpc

from ..common.errors import Cancelled, InternalError
from .attempts import Attempts
from .results import Completion, CompletionBuilder, Delta


class TextStream:
    """Iterate over the deltas of an answer; `text` and `completion` are what has arrived so far.

    The call begins at once. It ends with the answer, with an error, or when the stream is left: `close()`, the end of a
    `with` block, or the last reference to it gone; the server then stops working on it. One thread reads; any may close.

    Raises, from the iteration:
        PilotfishError: the class says what happened. What had arrived stays in `completion`.
    """

    def __init__(self, begin: Callable[[float | None], Any], attempts: Attempts, *, num_choices: int) -> None:
        """`begin(timeout_s)` makes a gRPC call that returns a stream of events."""
        self._begin = begin
        self._attempts = attempts
        self._builder = CompletionBuilder(num_choices=num_choices)
        self._closed = threading.Event()
        self._call = begin(attempts.remaining_s())

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while True:
            try:
                event = next(self._call)
            except StopIteration:
                if not self._builder.is_whole:
                    raise InternalError(f"the server ended request {self.request_id} before its answer was complete") from None
                raise
            except grpc.RpcError as failure:
                self._try_again(failure)
                continue
            delta = self._builder.add(event)
            if delta is not None:
                return delta

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

    def read_all(self) -> Completion:
        """Read to the end; returns the whole answer."""
        for _ in self:
            pass
        return self.completion

    def close(self) -> None:
        """End the call if it has not ended. A thread that waits for the next delta gets Cancelled."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _try_again(self, failure: grpc.RpcError) -> None:
        delay_s = self._attempts.delay_after(failure, answering=self._builder.has_delta, cancelled_here=self._closed.is_set())
        if self._closed.wait(delay_s):
            raise Cancelled("the stream was closed")
        self._call = self._begin(self._attempts.remaining_s())
