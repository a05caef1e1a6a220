"""An answer as it is produced, for threads. See async_text_stream.py for its asyncio twin."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import grpc

from ..common.errors import Cancelled, InternalError
from .attempts import Attempts
from .continuation import Continuation
from .requests import TextCall
from .results import Completion, CompletionBuilder, Delta


class TextStream:
    """Iterate over the deltas of an answer; `text` and `completion` are what has arrived so far.

    The call begins at once. It ends with the answer, with an error, or when the stream is left: `close()`, the end of a
    `with` block, or the last reference to it gone; the server then stops working on it. One thread reads; any may close.
    Where the connection breaks, or the server's process is replaced, the answer goes on at the next token.

    Raises, from the iteration:
        PilotfishError: the class says what happened. What had arrived stays in `completion`.
    """

    def __init__(
        self, begin: Callable[[str, Any, float | None], Any], end: Callable[[str], None], attempts: Attempts, call: TextCall
    ) -> None:
        """`begin(method, request, timeout_s)` makes a call that returns a stream of events; `end(request_id)` aborts."""
        self._call: Any = None
        self._begin = begin
        self._end = end
        self._attempts = attempts
        self._builder = CompletionBuilder(num_choices=call.num_choices)
        self._continuation = Continuation(call.method, call.request, self._builder)
        self._deltas: deque[Delta] = deque()  # arrived and not handed out
        self._closed = threading.Event()
        self._is_refused = False  # the server ended it with an error
        self._call = self._begin_next()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while not self._deltas:
            try:
                events = next(self._call)
            except StopIteration:
                if not self._builder.is_whole:
                    raise InternalError(f"the server ended request {self.request_id} before its answer was complete") from None
                raise
            except grpc.RpcError as failure:
                self._try_again(failure)
                continue
            self._attempts.progressed()
            self._deltas.extend(self._builder.add(events))
        return self._deltas.popleft()

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
        was_closed = self._closed.is_set()
        self._closed.set()
        self._deltas.clear()
        if not was_closed and not self._is_over:
            self._end(self._continuation.request_id)
        self._call.cancel()

    def __del__(self) -> None:
        if self._call is not None and not self._closed.is_set() and not self._is_over:
            # Not here: this may run inside of gRPC, which holds its locks then.
            threading.Thread(target=self._end, args=(self._continuation.request_id,), daemon=True).start()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _is_over(self) -> bool:
        return self._is_refused or self._builder.is_whole

    def _try_again(self, failure: grpc.RpcError) -> None:
        self._is_refused = True
        delay_s = self._attempts.delay_before_next(
            failure, self._continuation, answering=self._builder.has_delta, cancelled_here=self._closed.is_set()
        )
        self._is_refused = False
        if self._closed.wait(delay_s):
            raise Cancelled("the stream was closed")
        self._call = self._begin_next()

    def _begin_next(self) -> Any:
        return self._begin(*self._continuation.next(), self._attempts.remaining_s())
