"""A cluster in virtual time: real step schedulers, prefix caches, admission queue and policy; steps that only take time.

Everything happens in one loop over a heap of events, so hundreds of replicas need no cores of their own and two runs with one
seed are equal. A replica takes requests between steps and has one step in flight. Binding is late, as in the dispatcher: a
request leaves the queue when a replica has room for it, and the policy may hold it for a certain one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pilotfish.common.errors import Overloaded
from pilotfish.common.hashing import block_hashes, root_hash
from pilotfish.common.requests import (
    EngineRequest,
    FinishReason,
    KvEvent,
    SequenceOutput,
    StepOutput,
    StepTimings,
    TokenSampling,
)
from pilotfish.scheduler.admission import AdmissionQueue
from pilotfish.scheduler.scheduler_config import SchedulerConfig
from pilotfish.scheduler.step_plan import StepPlan, StepResult
from pilotfish.scheduler.step_scheduler import StepScheduler
from pilotfish.workers.timed_runner import QWEN3_8B_H200, TimingModel

_VOCABULARY = 50_000


@dataclass(frozen=True, slots=True)
class Turn:
    """`think_ms` after the turn before it has been answered comes the whole conversation so far and `tokens`."""

    tokens: tuple[int, ...]
    num_output: int
    think_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, the first of which comes at `arrival_ms`."""

    arrival_ms: float
    turns: tuple[Turn, ...]


@dataclass(slots=True)
class SimulatedRequest:
    """One turn on its way, and what became of it. Times are virtual milliseconds, 0 until they are known."""

    request_id: str
    conversation: Conversation
    turn: int
    prompt: tuple[int, ...]
    arrival_ms: float
    hashes: Sequence[bytes] = ()
    output: list[int] = field(default_factory=list)
    replica: str = ""
    cached_tokens: int = 0
    sent_ms: float = 0.0
    first_token_ms: float = 0.0
    end_ms: float = 0.0
    refused: bool = False

    @property
    def ttft_ms(self) -> float:
        return self.first_token_ms - self.arrival_ms

    @property
    def tpot_ms(self) -> float:
        return (self.end_ms - self.first_token_ms) / max(len(self.output) - 1, 1)


class RoutingPolicy(Protocol):
    """Chooses replicas, and is told what the controller would be told. `hold_ms`: how long it may hold a request."""

    hold_ms: float

    def add_replica(self, replica: str, sizes: ReplicaSizes) -> None: ...

    def has_room(self) -> bool:
        """Whether it takes a request from the queue."""

    def choose(self, request: SimulatedRequest, *, tick: int) -> str | None:
        """A replica, or None: the request is held, until `next_ready` names it."""

    def next_ready(self, *, tick: int) -> str | None:
        """A held request that is to be chosen for again."""

    def take_step(self, replica: str, step: StepOutput) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSizes:
    """Of every replica. The cache is small, so that blocks are evicted within seconds of load."""

    num_blocks: int = 4096
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 16_384

    def scheduler(self) -> StepScheduler:
        return StepScheduler(
            SchedulerConfig(
                num_blocks=self.num_blocks,
                block_size=self.block_size,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_model_len=self.max_model_len,
            )
        )


@dataclass(slots=True)
class _Replica:
    name: str
    scheduler: StepScheduler
    timing: TimingModel
    plan: StepPlan | None = None
    num_steps: int = 0
    busy_ms: float = 0.0


class Simulation:
    """One run. `requests` has all turns in the order of their arrival, `busy_ms` the time that each replica computed."""

    def __init__(
        self,
        policy: RoutingPolicy,
        *,
        num_replicas: int,
        sizes: ReplicaSizes | None = None,
        timing: TimingModel = QWEN3_8B_H200,
        max_queued: int = 100_000,
        on_events: Callable[[str, Sequence[KvEvent]], object] | None = None,
    ) -> None:
        self.now_ms = 0.0
        self.requests: list[SimulatedRequest] = []
        self._policy = policy
        self._sizes = sizes or ReplicaSizes()
        self._on_events = on_events
        names = [f"replica-{number}" for number in range(num_replicas)]
        self._replicas = {name: _Replica(name, self._sizes.scheduler(), timing) for name in names}
        for name in names:
            policy.add_replica(name, self._sizes)
        self._queue: AdmissionQueue[SimulatedRequest] = AdmissionQueue(max_queued=max_queued)
        self._running: dict[str, SimulatedRequest] = {}
        self._held: dict[str, SimulatedRequest] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0

    @property
    def busy_ms(self) -> list[float]:
        return [replica.busy_ms for replica in self._replicas.values()]

    def run(self, conversations: Sequence[Conversation]) -> None:
        """Until every turn has been answered or refused."""
        for conversation in conversations:
            self._arrive_at(conversation.arrival_ms, conversation, turn=0, history=())
        while self._events:
            self.now_ms, _, happen = heapq.heappop(self._events)
            happen()

    def check_invariants(self) -> None:
        """Raises AssertionError: a scheduler's books are wrong, or something is left of a run."""
        for replica in self._replicas.values():
            replica.scheduler.check_invariants()
            assert not replica.scheduler.has_work
        assert not self._running
        assert not self._held
        assert not len(self._queue)

    def _at(self, time_ms: float, happen: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_ms, self._num_events, happen))

    def _arrive_at(self, time_ms: float, conversation: Conversation, *, turn: int, history: tuple[int, ...]) -> None:
        def arrive() -> None:
            prompt = history + conversation.turns[turn].tokens
            request = SimulatedRequest(f"r{len(self.requests)}", conversation, turn, prompt, self.now_ms)
            request.hashes = block_hashes(prompt, self._sizes.block_size, parent=root_hash())
            self.requests.append(request)
            try:
                self._queue.push(request, request_id=request.request_id, now_ms=int(self.now_ms))
            except Overloaded:
                request.refused = True
            self._pump()

        self._at(time_ms, arrive)

    def _pump(self) -> None:
        policy, tick = self._policy, int(self.now_ms)
        while self._held and (request_id := policy.next_ready(tick=tick)) is not None:
            self._route(self._held.pop(request_id))
        while len(self._queue) and policy.has_room():
            request = self._queue.pop(tick)
            if request is None:
                return
            self._route(request)

    def _route(self, request: SimulatedRequest) -> None:
        chosen = self._policy.choose(request, tick=int(self.now_ms))
        if chosen is None:
            self._held[request.request_id] = request
            self._at(self.now_ms + self._policy.hold_ms, self._pump)  # it may have to go elsewhere by then
            return
        request.replica, replica = chosen, self._replicas[chosen]
        request.sent_ms = self.now_ms
        self._running[request.request_id] = request
        sampling = TokenSampling(temperature=0.0, max_tokens=request.conversation.turns[request.turn].num_output, seed=0)
        replica.scheduler.add(EngineRequest(request_id=request.request_id, prompt_token_ids=request.prompt, sampling=sampling))
        if replica.plan is None:
            self._start_step(replica)

    def _start_step(self, replica: _Replica) -> None:
        replica.plan = replica.scheduler.plan()
        if replica.plan is not None:
            step_ms = replica.timing.plan_ms(replica.plan)
            replica.busy_ms += step_ms
            self._at(self.now_ms + step_ms, lambda: self._end_step(replica, step_ms))

    def _end_step(self, replica: _Replica, step_ms: float) -> None:
        plan = replica.plan
        assert plan is not None
        token_ids = tuple(self._token_of(row.request_id, row.output_position) for row in plan.rows if row.samples)
        replica.scheduler.update(StepResult(plan.step_id, token_ids, (None,) * len(token_ids)))
        first_event_id, events = replica.scheduler.drain_kv_events()
        replica.num_steps += 1
        step = StepOutput(
            step_id=replica.num_steps,
            sequences=tuple(replica.scheduler.drain_outputs()),
            first_event_id=first_event_id,
            kv_events=events,
            num_batched_tokens=plan.num_tokens,
            timings=StepTimings(total_ms=step_ms),
        )
        replica.plan = None
        self._policy.take_step(replica.name, step)
        if self._on_events is not None:
            self._on_events(replica.name, events)
        for output in step.sequences:
            self._take_output(output)
        if self._held or len(self._queue):
            self._pump()
        if replica.plan is None:
            self._start_step(replica)

    def _token_of(self, request_id: str, position: int) -> int:
        return (int(request_id[1:]) * 7919 + position) % _VOCABULARY

    def _take_output(self, output: SequenceOutput) -> None:
        request = self._running[output.request_id]
        if not request.output:
            request.first_token_ms, request.cached_tokens = self.now_ms, output.cached_tokens
        request.output += output.token_ids
        if output.finish_reason is None:
            return
        assert output.finish_reason is FinishReason.LENGTH, output.error
        del self._running[request.request_id]
        request.end_ms = self.now_ms
        turns, turn = request.conversation.turns, request.turn + 1
        if turn < len(turns):
            history = request.prompt + tuple(request.output)
            self._arrive_at(self.now_ms + turns[turn].think_ms, request.conversation, turn=turn, history=history)
