"""From an engine's thread to callers' threads: which call each request belongs to, and what has come for it.

A call submits requests and waits for their outputs; leaving it, by any way, aborts what still runs. It holds at most what its
requests may produce. Ctrl-C leaves its methods at their ends only (interrupts.py), so that the engine's locks are free and
every request is known here or not at all.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from ..common.errors import InternalError, Overloaded, PilotfishError
from ..common.requests import EngineRequest, SequenceOutput, StepOutput
from .engine import Engine, Phase
from .interrupts import Uninterrupted

# How often a waiting call looks whether the engine is still alive.
_HEALTH_INTERVAL_S = 1.0
_OVERLOADED_WAIT_S = 0.05


class CallRouter:
    """The `on_step` of an engine that is used in this process."""

    def __init__(self) -> None:
        self._calls: dict[str, EngineCall] = {}

    def __call__(self, step: StepOutput) -> None:
        for output in step.sequences:
            call = self._calls.get(output.request_id)
            if call is not None:
                call.put(output)

    # Single dictionary operations, atomic under the interpreter's lock: callers and the engine's thread need no other.
    def register(self, request_id: str, call: EngineCall) -> None:
        self._calls[request_id] = call

    def forget(self, request_id: str) -> None:
        self._calls.pop(request_id, None)


class EngineCall:
    """Requests submitted together, as a context manager."""

    def __init__(self, engine: Engine, router: CallRouter) -> None:
        self._engine = engine
        self._router = router
        self._running: dict[str, None] = {}
        # None: look up, Ctrl-C has come. Unlike a Condition, this may be used by a signal's handler.
        self._outputs: queue.SimpleQueue[SequenceOutput | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with Uninterrupted():
            for request_id in list(self._running):
                self._leave(request_id)
                self._engine.abort(request_id)

    @property
    def num_running(self) -> int:
        """Requests whose engine has not said that they ended."""
        return len(self._running)

    def submit(self, request: EngineRequest) -> None:
        """As `Engine.submit`, but waits while the engine holds as many requests as it can."""
        while not self._has_room_for(request):
            time.sleep(_OVERLOADED_WAIT_S)

    def _has_room_for(self, request: EngineRequest) -> bool:
        with Uninterrupted():
            self._router.register(request.request_id, self)
            self._running[request.request_id] = None
            try:
                self._engine.submit(request)
            except PilotfishError as error:
                self._leave(request.request_id)
                if isinstance(error, Overloaded):
                    return False
                raise
        return True

    def _leave(self, request_id: str) -> None:
        self._running.pop(request_id, None)
        self._router.forget(request_id)

    def abort(self, request_id: str) -> None:
        with Uninterrupted():
            self._engine.abort(request_id)

    def put(self, output: SequenceOutput) -> None:
        """Called by the engine's thread."""
        self._outputs.put(output)

    def wait(self) -> Sequence[SequenceOutput]:
        """All outputs that have come, after waiting for the first.

        Raises:
            InternalError: the engine has failed or was stopped.
        """
        outputs: list[SequenceOutput] = []
        while not outputs:
            with Uninterrupted(on_interrupt=lambda: self._outputs.put(None)):
                outputs = self._take()
            if not outputs:
                self._require_engine()
        return outputs

    def _take(self) -> list[SequenceOutput]:
        """What has come, after waiting for the first; nothing after _HEALTH_INTERVAL_S, or at Ctrl-C."""
        taken: list[SequenceOutput] = []
        try:
            output = self._outputs.get(timeout=_HEALTH_INTERVAL_S)
            while output is not None:
                taken.append(output)
                if output.finish_reason is not None:
                    self._leave(output.request_id)
                output = self._outputs.get_nowait()
        except queue.Empty:
            pass
        return taken

    def _require_engine(self) -> None:
        health = self._engine.health()
        if health.phase in (Phase.FAILED, Phase.STOPPED):
            raise InternalError(f"the engine is gone ({health.phase}): {health.message}")
