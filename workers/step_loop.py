"""Plan, launch, update, report: the loop of an engine, one turn at a time and on one thread.

Up to `max_in_flight` steps are launched and not yet completed. With one, a turn is plan, run, update. With two, a turn plans
and launches the next step while the device still runs this one, then completes this one: results are seen one step late. While
requests arrive, a turn had better begin shortly before this step ends, so that what has come by then need not wait for another.

Of several data ranks every turn is a turn of all (step_agreement.py); one without rows launches a step all the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ..common.errors import InternalError
from ..common.requests import EngineRequest, ExpertBalance, StepOutput, StepTimings
from ..scheduler.step_plan import StepPlan, StepResult
from ..scheduler.step_scheduler import StepScheduler
from .step_agreement import StepAgreement

# A turn begins so long before the step in flight ends: to plan and launch takes less than a millisecond, the rest is for a
# thread that wakes late. Where the device had to wait all the same it becomes longer, and a little shorter with every turn.
_LEAST_LEAD_S, _MORE_WHEN_LATE_S, _LESS_A_TURN = 1.5e-3, 1e-3, 0.995
_LONGEST_STEP_S = 0.1  # that is believed: beyond, something held the device up
_ARRIVALS_S = 0.5  # where none has come for so long none is waited for


class LaunchedStep(Protocol):
    """A step that the device runs or has run: a ModelRunner's PendingStep."""

    @property
    def plan(self) -> StepPlan: ...

    @property
    def has_arrived(self) -> bool:
        """Whether `result` would not wait."""

    def result(self) -> StepResult:
        """Waits for the step's end."""

    def spent_ms(self) -> Mapping[str, float]:
        """Where its time went on the device, by "forward" and "sample"; asked after `result`."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    pending: LaunchedStep
    is_planned: bool  # by this rank's scheduler, which waits for its result
    start_s: float
    plan_ms: float


class StepRunner(Protocol):
    """A ModelRunner, alone or at the head of others (ranks.py), or what stands for one (timed_runner.py)."""

    @property
    def failure(self) -> str:
        """Why the steps in flight will never end, "" while they may."""

    @property
    def expert_balance(self) -> ExpertBalance | None:
        """None where experts do not move, and of data ranks on all but the first."""

    @property
    def agreement(self) -> StepAgreement | None:
        """With the leaders of other data ranks, where there are some."""

    def launch(self, plan: StepPlan) -> LaunchedStep: ...
    def close(self) -> None: ...


class StepLoop:
    """Drives a scheduler and a runner; every turn that has something to tell calls `on_step` once.

    Attributes:
        step_id: of the last message; messages count from 1 without gaps.
        is_paused: no step begins, though there are sequences.
        plan_at_s: until then (monotonic clock) the next turn may wait without the device waiting for it; 0: it had better not.
        busy_since_s: when the step that is not yet reported began (monotonic clock); None while there is none.
    """

    def __init__(
        self, runner: StepRunner, scheduler: StepScheduler, *, on_step: Callable[[StepOutput], None], max_in_flight: int
    ) -> None:
        self.scheduler = scheduler
        self.step_id = 0
        self.is_paused = False
        self.plan_at_s = 0.0
        self.busy_since_s: float | None = None
        self._runner = runner
        self._on_step = on_step
        self._max_in_flight = max_in_flight
        self._in_flight: deque[_InFlight] = deque()
        self._last_end_s = 0.0
        self._last_arrival_s = 0.0
        self._lead_s = _LEAST_LEAD_S
        self._decode_times_s: deque[float] = deque(maxlen=2)  # of the device, for the last steps that only decoded

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or (self.scheduler.has_work and not self.is_paused)

    @property
    def idle_wait_s(self) -> float | None:
        """How long to wait for work before the next turn, where there is none; None: until there is some."""
        agreement = self._runner.agreement
        return None if agreement is None else agreement.wait_s

    def add(self, request: EngineRequest) -> None:
        """Puts it in line, see StepScheduler.add."""
        self.scheduler.add(request)
        self._last_arrival_s = time.monotonic()

    def advance(self) -> None:
        """One turn: at most one step launched and one completed.

        Raises:
            ReplicaStopped: another data rank was stopped.
        """
        start_s, has_rested = time.monotonic(), self.plan_at_s > 0
        plan = own_plan = None if self.is_paused else self.scheduler.plan()
        plan_ms = (time.monotonic() - start_s) * 1e3
        if self._runner.agreement is not None:
            plan = self._runner.agreement.join(own_plan, self.scheduler.plan_nothing)
        if plan is not None:
            if not self._in_flight:
                self.busy_since_s = time.monotonic()
            self._in_flight.append(_InFlight(self._runner.launch(plan), own_plan is not None, start_s, plan_ms))
            self._adapt_lead(is_late=has_rested and self._in_flight[0].pending.has_arrived)
        if self._in_flight and (plan is None or len(self._in_flight) == self._max_in_flight):
            self._complete()
        elif plan is None:
            self._report(StepTimings(), num_batched_tokens=0)
        self.plan_at_s = self._latest_plan_s()

    def _latest_plan_s(self) -> float:
        """Shortly before the step in flight ends, where that is known: it decodes like the last that did. Else at once."""
        now_s = time.monotonic()
        if (
            len(self._in_flight) != 1
            or not self._decode_times_s
            or not _only_decodes(self._in_flight[0].pending.plan)
            or self.scheduler.num_waiting > 0  # more has come than fits
            or now_s - self._last_arrival_s > _ARRIVALS_S
            or self._runner.agreement is not None  # other ranks would wait
        ):
            return 0.0
        latest_s = self._last_end_s + min(*self._decode_times_s, _LONGEST_STEP_S) - self._lead_s
        return latest_s if latest_s > now_s else 0.0

    def _adapt_lead(self, *, is_late: bool) -> None:
        self._lead_s = max(self._lead_s * _LESS_A_TURN + (_MORE_WHEN_LATE_S if is_late else 0.0), _LEAST_LEAD_S)

    def finish(self) -> None:
        """Completes what is in flight and reports the rest, without starting anything. Other data ranks are told of the end."""
        while self._in_flight:
            self._complete()
        self._report(StepTimings(), num_batched_tokens=0)
        if self._runner.agreement is not None:
            self._runner.agreement.leave()

    def _complete(self) -> None:
        step = self._in_flight.popleft()
        result = step.pending.result()
        if self._runner.failure:  # it ended without the other ranks
            raise InternalError(self._runner.failure)
        if step.is_planned:
            self.scheduler.update(result)
        now_s = time.monotonic()
        spent_ms = step.pending.spent_ms()
        timings = StepTimings(
            plan_ms=step.plan_ms,
            forward_ms=spent_ms.get("forward", 0.0),
            sample_ms=spent_ms.get("sample", 0.0),
            total_ms=(now_s - max(step.start_s, self._last_end_s)) * 1e3,  # before, the device was another step's
        )
        self._last_end_s = now_s
        if _only_decodes(step.pending.plan):
            self._decode_times_s.append(sum(spent_ms.values()) / 1e3)  # not total_ms: a late turn would make the next ones late
        self._report(timings if step.is_planned else StepTimings(), num_batched_tokens=step.pending.plan.num_tokens)
        self.busy_since_s = now_s if self._in_flight else None

    def _report(self, timings: StepTimings, *, num_batched_tokens: int) -> None:
        sequences = tuple(self.scheduler.drain_outputs())
        first_event_id, kv_events = self.scheduler.drain_kv_events()
        if not (sequences or kv_events or num_batched_tokens):
            return
        self.step_id += 1
        self._on_step(
            StepOutput(
                step_id=self.step_id,
                sequences=sequences,
                first_event_id=first_event_id,
                kv_events=kv_events,
                num_batched_tokens=num_batched_tokens,
                timings=timings,
                load=replace(self.scheduler.load(), expert_balance=self._runner.expert_balance),
            )
        )


def _only_decodes(plan: StepPlan) -> bool:
    return plan.num_tokens == len(plan.rows)
