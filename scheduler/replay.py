"""What the router would have done with a trace of arrivals: the same Router over real step schedulers, in virtual time.

Only the model is missing: a step takes what a StepTime says. Nothing is random, so two runs of one trace are equal, and a
change of RouterConfig can be judged on yesterday's traffic.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..common.hashing import block_hashes, root_hash
from ..common.requests import EngineRequest, FinishReason, StepOutput, StepTimings, TokenSampling
from .arrivals import Arrival
from .router import ReplicaLimits, Router, RouterConfig
from .scheduler_config import SchedulerConfig
from .step_plan import StepPlan, StepResult
from .step_scheduler import StepScheduler
from .step_times import StepTime


@dataclass(slots=True)
class ReplayedRequest:
    """What became of an arrival. Times are of the trace's clock; `error` is why it could not run."""

    arrival: Arrival
    request_id: str
    hashes: Sequence[bytes]
    replica: str = ""
    was_held: bool = False
    cached_tokens: int = 0
    num_output: int = 0
    first_token_ms: float = 0.0
    end_ms: float = 0.0
    error: str = ""

    @property
    def ttft_ms(self) -> float:
        return self.first_token_ms - self.arrival.time_ms


@dataclass(slots=True)
class _Replica:
    scheduler: StepScheduler
    busy_ms: float = 0.0
    plan: StepPlan | None = None


@dataclass(slots=True)
class Replay:
    """A fleet of equal replicas. `run` returns when every arrival was answered; `router` can then be asked to explain."""

    router: Router
    engine: SchedulerConfig
    step_time: StepTime
    hold_ticks: int
    now_ms: float = 0.0
    requests: dict[str, ReplayedRequest] = field(default_factory=dict)
    _replicas: dict[str, _Replica] = field(default_factory=dict)
    _queue: deque[ReplayedRequest] = field(default_factory=deque)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _num_events: int = 0

    @classmethod
    def create(cls, config: RouterConfig, engine: SchedulerConfig, step_time: StepTime, *, num_replicas: int) -> Replay:
        replay = cls(Router(config), engine, step_time, config.hold_ticks)
        limits = ReplicaLimits(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            num_blocks=engine.num_blocks,
        )
        for number in range(num_replicas):
            name = f"replica-{number}"
            replay.router.add_replica(name, limits)
            replay._replicas[name] = _Replica(StepScheduler(engine))
        return replay

    def run(self, arrivals: Sequence[Arrival]) -> list[ReplayedRequest]:
        """Outcomes in the order of `arrivals`."""
        for number, arrival in enumerate(arrivals):
            hashes = block_hashes(arrival.token_ids, self.engine.block_size, parent=root_hash())
            request = ReplayedRequest(arrival, f"r{number}", hashes)
            self.requests[request.request_id] = request
            self._at(arrival.time_ms, lambda request=request: self._arrive(request))  # type: ignore[misc]
        while self._events:
            self.now_ms, _, happen = heapq.heappop(self._events)
            happen()
        assert not self._queue, "the replay ended with requests queued"
        return list(self.requests.values())

    @property
    def busy_ms(self) -> dict[str, float]:
        """How long each replica computed."""
        return {name: replica.busy_ms for name, replica in self._replicas.items()}

    def _at(self, time_ms: float, happen: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_ms, self._num_events, happen))

    def _arrive(self, request: ReplayedRequest) -> None:
        self._queue.append(request)
        self._pump()

    def _pump(self) -> None:
        names = list(self._replicas)
        while (request_id := self.router.next_ready(names, tick=int(self.now_ms))) is not None:
            self._route(self.requests[request_id])
        while self._queue and any(map(self.router.has_room, names)):
            self._route(self._queue.popleft())

    def _route(self, request: ReplayedRequest) -> None:
        arrival = request.arrival
        choice = self.router.route(
            request.request_id,
            hashes=request.hashes,
            num_tokens=len(arrival.token_ids),
            expected_output_tokens=arrival.output_tokens,
            tick=int(self.now_ms),
        )
        request.replica = choice.replica
        if choice.is_held:
            request.was_held = True
            self._at(self.now_ms + self.hold_ticks, self._pump)
            return
        sampling = TokenSampling(temperature=0.0, max_tokens=arrival.output_tokens, seed=0)
        replica = self._replicas[choice.replica]
        replica.scheduler.add(
            EngineRequest(request_id=request.request_id, prompt_token_ids=arrival.token_ids, sampling=sampling)
        )
        if replica.plan is None:
            self._start_step(choice.replica)

    def _start_step(self, name: str) -> None:
        replica = self._replicas[name]
        replica.plan = replica.scheduler.plan()
        if replica.plan is not None:
            num_decoding = sum(row.num_tokens == 1 for row in replica.plan.rows)
            step_ms = self.step_time.step_ms(num_decoding, replica.plan.num_tokens - num_decoding)
            replica.busy_ms += step_ms
            self._at(self.now_ms + step_ms, lambda: self._end_step(name, step_ms))
        elif outputs := tuple(replica.scheduler.drain_outputs()):  # it never fits
            self._report(name, StepOutput(step_id=0, sequences=outputs))

    def _end_step(self, name: str, step_ms: float) -> None:
        replica = self._replicas[name]
        plan = replica.plan
        assert plan is not None
        token_ids = tuple(row.output_position for row in plan.rows if row.samples)
        replica.scheduler.update(StepResult(plan.step_id, token_ids, (None,) * len(token_ids)))
        first_event_id, events = replica.scheduler.drain_kv_events()
        step = StepOutput(
            step_id=plan.step_id,
            sequences=tuple(replica.scheduler.drain_outputs()),
            first_event_id=first_event_id,
            kv_events=events,
            num_batched_tokens=plan.num_tokens,
            timings=StepTimings(total_ms=step_ms),
        )
        replica.plan = None
        self._report(name, step)
        if replica.plan is None:
            self._start_step(name)

    def _report(self, name: str, step: StepOutput) -> None:
        complete = self.router.take_step(name, step)
        assert complete, "an event was lost in a replay"
        for output in step.sequences:
            request = self.requests[output.request_id]
            if not request.num_output:
                request.first_token_ms, request.cached_tokens = self.now_ms, output.cached_tokens
            request.num_output += len(output.token_ids)
            if output.finish_reason is not None:
                request.end_ms = self.now_ms
                request.error = output.error if output.finish_reason is FinishReason.ERROR else ""
        self._pump()
