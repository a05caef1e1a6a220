"""What the server needs of an engine. engine.py is it; a stand-in for tests of timing and faults has the same verbs."""

from __future__ import annotations

from typing import Protocol

from ..common.requests import EngineRequest
from ..scheduler.snapshot import SchedulerSnapshot

FAILED_PHASE = "failed"


class EngineHealth(Protocol):
    """`ok`: steps complete, or there is nothing to do; else `message` says why not. `step_age_s`: of this step, 0 when idle.

    An engine whose `phase` is FAILED_PHASE cannot go on and does not answer its requests.
    """

    @property
    def ok(self) -> bool: ...
    @property
    def phase(self) -> str: ...
    @property
    def step_id(self) -> int: ...
    @property
    def step_age_s(self) -> float: ...
    @property
    def message(self) -> str: ...


class EngineSnapshot(Protocol):
    """The state after step `step_id`."""

    @property
    def step_id(self) -> int: ...
    @property
    def scheduler(self) -> SchedulerSnapshot: ...


class EngineInterface(Protocol):
    """Only `snapshot` may wait for a step."""

    def submit(self, request: EngineRequest) -> None:
        """Raises PilotfishError if the request cannot be taken; else exactly one output with a finish reason will come."""

    def abort(self, request_id: str) -> object: ...
    def pause(self, is_paused: bool) -> object:
        """While paused no step begins; aborts and deadlines end requests as ever, and `health` is well."""

    def snapshot(self) -> EngineSnapshot: ...
    def health(self) -> EngineHealth: ...
