"""Requests to replicas and outputs back: admission queue -> router -> link, and steps -> streams.

Binding is late: a sequence leaves the queue only when a replica has room, and the router may hold it for one that has what it
needs cached. What runs where is known exactly, since every submit and every last output passes here. A sequence whose replica
is lost, or gives it up, goes back in front of the queue with its known tokens; who may have killed it runs apart (Suspects).
Everything runs on the controller's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..common import logs
from ..common.cluster_state import ReplicaStatus
from ..common.errors import InternalError, PilotfishError, PoisonousRequest
from ..common.hashing import block_hashes, root_hash
from ..common.requests import BlockStored, EngineRequest, FinishReason, SequenceOutput, StepOutput, WorkerInfo
from ..common.routing import RouteDecision
from ..scheduler.admission import BATCH, INTERACTIVE, AdmissionQueue, priority_class
from ..scheduler.drain_rate import Pace
from ..scheduler.return_queue import ReturnQueue
from ..scheduler.router import Choice, ReplicaLimits, Router, RouterConfig
from ..scheduler.snapshot import RunningRequest
from ..scheduler.suspects import Suspects
from .charges import Charges
from .events import Observer
from .sequence_state import SequenceState
from .streams import RequestStream
from .version_choice import VersionChoice

logger = logging.getLogger(__name__)


class Target(Protocol):
    """What the dispatcher needs of a link."""

    connected: bool

    def submit(self, request: EngineRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What there is to do, in sequences. What runs on replicas that take nothing new does not count.

    `num_batch`: of batch work (priority below 0), running or waiting; the other numbers are of all else. `wait_ms`: how long
    one that came now would wait before its prompt is computed.
    """

    num_running: int
    num_queued: int
    num_batch: int
    wait_ms: float


@dataclass(slots=True)
class _Replica:
    """`group`: who has the same dies with it."""

    target: Target
    group: str
    accepting: bool = False


class Dispatcher:
    """See the module's docstring. `num_queued` and `num_running` count sequences."""

    def __init__(
        self,
        *,
        max_queued: int,
        max_attempts: int,
        block_size: int,
        tenant_weights: Mapping[str, float] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        config = RouterConfig(block_size=block_size)
        self.router = Router(config)
        self._hold_s = config.hold_ticks / 1000
        self._block_size = block_size
        self._max_queued = max_queued
        self._max_attempts = max_attempts
        self._observers = observers
        self._replicas: dict[str, _Replica] = {}
        self._queue: AdmissionQueue[SequenceState] = AdmissionQueue(
            max_queued=max_queued, weights=tenant_weights, expected_pace=self._expected_pace
        )
        self._charges = Charges(self.router, self._queue)
        self._versions = VersionChoice(self.router, block_size=block_size)
        self._returned: ReturnQueue[SequenceState] = ReturnQueue()
        self._suspects = Suspects(max_attempts)
        self._held: dict[str, SequenceState] = {}
        self._running: dict[str, SequenceState] = {}
        self._expected: dict[str, SequenceState] = {}
        self._run_id = secrets.token_hex(4)
        self._num_submits = 0

    @property
    def num_queued(self) -> int:
        return len(self._queue) + len(self._returned) + len(self._held)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def expected_output_tokens(self) -> float:
        """The mean length of answers."""
        return self._charges.expected_output_tokens

    # Requests.

    def check_room(self, num_arriving: int, *, tenant: str, priority: int, retry_key: str) -> None:
        """Refuse a request before any work is spent on it.

        Raises:
            Overloaded: as many requests as the queue may hold are on their way to it.
        """
        if num_arriving >= self._max_queued:
            raise self._queue.refusal(tenant, priority=priority, retry_key=retry_key, now_ms=_now_ms())

    def enqueue(self, stream: RequestStream, *, retry_key: str = "", is_more: bool = False) -> None:
        """Queue all choices of a request, where there is a place for its first one: a full queue would never have as many free
        as it needs. `retry_key` names its caller over several attempts; `is_more`: the call that it is of has a place already.

        Raises:
            Overloaded: there is no place.
        """
        for number, sequence in enumerate(stream.sequences):
            self._queue.push(
                sequence,
                request_id=sequence.request.request_id,
                now_ms=_now_ms(),
                tenant=stream.tenant.name,
                priority=sequence.request.priority,
                cost=self._charges.estimate(sequence),
                retry_key=retry_key,
                is_more=is_more or number > 0,
            )
            self.pump()

    def expect(self, stream: RequestStream) -> None:
        """A request of an earlier controller: its choices may be running on a worker, which `adopt` will hear of."""
        for sequence in stream.sequences:
            self._expected[sequence.request.request_id] = sequence

    def adopt(self, name: str, runs: Sequence[RunningRequest]) -> dict[str, EngineRequest]:
        """Take over what runs on a replica for an earlier controller; returns those runs, by their names on the wire.

        The rest has to be ended there: nobody waits for it, it runs elsewhere, or part of its output is missing here (a worker
        keeps a run's tokens, but not their log probabilities).
        """
        adopted: dict[str, EngineRequest] = {}
        for run in runs:
            sequence = self._expected.get(run.request_id.rpartition("~")[0])
            if sequence is None or sequence.request.sampling.logprobs is not None:
                continue
            if sequence.output_token_ids != list(run.output_token_ids[: len(sequence.output_token_ids)]):
                continue
            del self._expected[sequence.request.request_id]
            sequence.learn(run.output_token_ids)
            if sequence.finish_reason is not None:
                sequence.stream.end_if_complete()
                continue
            self._returned.remove(sequence)
            self._place(sequence, run.request_id, [name], may_hold=False)
            adopted[run.request_id] = sequence.to_submit()
        return adopted

    def resume(self, sequence: SequenceState, token_ids: Sequence[int]) -> None:
        """Go on with a choice of an earlier controller from what its client has, unless a worker has got as far.

        Raises:
            InvalidRequest: what the client has is not of this answer.
        """
        if len(token_ids) > len(sequence.output_token_ids):
            self._withdraw(sequence)
        sequence.learn(token_ids)
        is_under_way = sequence.wire_id in self._running or sequence.wire_id in self._held or sequence in self._returned
        if sequence.finish_reason is None and not is_under_way:
            self._returned.append(sequence)

    def release(self, stream: RequestStream) -> None:
        """A stream has ended: what is left of it leaves the queue, or is ended on its worker."""
        for sequence in stream.sequences:
            self.drop(sequence)

    def drop(self, sequence: SequenceState) -> None:
        """Nobody waits for more of a choice."""
        if self._expected.get(sequence.request.request_id) is sequence:
            del self._expected[sequence.request.request_id]
        self._queue.remove(sequence.request.request_id)
        if self._held.pop(sequence.wire_id, None) is not None:
            self.router.finish(sequence.wire_id)
        self._abort(sequence)
        self._returned.remove(sequence)
        self._suspects.clear(sequence.request.request_id)

    def fail_queued(self, error: PilotfishError) -> None:
        """No replica will ever take what is queued."""
        for held in list(self._held.values()):
            held.stream.fail(error)
        while (sequence := self._returned.pop() or self._queue.pop(_now_ms())) is not None:
            sequence.stream.fail(error)

    def fail_all(self, error: PilotfishError) -> None:
        """No replica will go on with anything."""
        for sequence in list(self._running.values()):
            sequence.stream.fail(error)
        self.fail_queued(error)

    def pump(self) -> None:
        """Hand out what is held and then what is queued, while a replica has room."""
        if not self.num_queued:
            return
        candidates = [name for name, replica in self._replicas.items() if replica.accepting and replica.target.connected]
        while (wire_id := self.router.next_ready(self._open_to(0, candidates), tick=_now_ms())) is not None:
            self._route(self._held.pop(wire_id), wire_id, candidates)
        while (self._returned or len(self._queue)) and any(map(self.router.has_room, candidates)):
            sequence = self._next(candidates)
            if sequence is None:
                return
            self._num_submits += 1
            self._route(sequence, f"{sequence.request.request_id}~{self._run_id}.{self._num_submits}", candidates)

    def demand(self) -> Demand:
        """Takes time in proportion to the sequences in flight."""
        running = [s for s in self._running.values() if self._replicas[s.replica].accepting]
        waiting = [*self._returned, *self._held.values()]
        num_running, num_waiting = (
            sum(priority_class(s.request.priority) == INTERACTIVE for s in sequences) for sequences in (running, waiting)
        )
        backlogs_ms = (
            self.router.queued_tokens(name) * self.router.step_times.of(name).ms_per_token
            for name, replica in self._replicas.items()
            if replica.accepting
        )
        return Demand(
            num_running=num_running,
            num_queued=num_waiting + self._queue.num_of(INTERACTIVE),
            num_batch=len(running) + len(waiting) - num_running - num_waiting + self._queue.num_of(BATCH),
            wait_ms=self._queue.oldest_wait_ms(INTERACTIVE, _now_ms()) + min(backlogs_ms, default=0.0),
        )

    def explain(self, request_id: str) -> tuple[RouteDecision, ...]:
        """The router's choices for a request, oldest first; empty where none is kept."""
        return self.router.explain(request_id)

    def with_routing(self, status: ReplicaStatus) -> ReplicaStatus:
        """With what the router knows of the place, if it takes requests."""
        if status.name not in self._replicas:
            return status
        return replace(status, routing=self.router.state(status.name, status.load))

    # Replicas.

    def add_replica(self, name: str, target: Target, info: WorkerInfo, *, group: str = "") -> None:
        """From `start_accepting` on the replica gets requests while it is connected and has room. Those of one `group` (if left
        out, it alone) live and die together."""
        limits = ReplicaLimits(
            max_num_seqs=info.max_num_seqs, max_num_batched_tokens=info.max_num_batched_tokens, num_blocks=info.num_blocks
        )
        self.router.add_replica(name, limits)
        self._replicas[name] = _Replica(target, group or name)
        self._charges.add_replica(name, kv_capacity_tokens=info.num_blocks * info.block_size)
        self._versions.add_replica(name, info.model_version)

    def start_accepting(self, name: str) -> None:
        """The caller calls `pump` when all have started that start together."""
        self._replicas[name].accepting = True

    def stop_accepting(self, name: str) -> None:
        """Nothing new for this replica; what runs there goes on. What is held for it goes elsewhere with the next `pump`."""
        self._replicas[name].accepting = False
        self._returned.extend(self._held.pop(wire_id) for wire_id in self.router.release_held(name))

    def is_accepting(self, name: str) -> bool:
        return self._replicas[name].accepting

    def num_running_on(self, name: str) -> int:
        return self.router.num_active(name)

    def move_away(self, name: str, reason: str) -> None:
        """What runs on a replica that takes nothing new goes on elsewhere at its next token. It is no failed try."""
        for sequence in [s for s in self._running.values() if s.replica == name]:
            if sequence.stream.ended or sequence.finish_reason is not None:
                continue  # it is ending there
            self._withdraw(sequence)
            sequence.num_attempts -= 1
            self._return(sequence, reason)
        self.pump()

    def remove_replica(self, name: str, reason: str, *, has_failed: bool = True) -> bool:
        """The replica is gone; what ran there runs elsewhere. Where it `has_failed`, who was on too many that did ends with
        PoisonousRequest; True: there was one."""
        del self._replicas[name]
        self._charges.remove_replica(name)
        self._versions.remove_replica(name)
        self._returned.extend(self._held.pop(wire_id) for wire_id in self.router.remove_replica(name))
        lost = [(wire_id, sequence) for wire_id, sequence in self._running.items() if sequence.replica == name]
        for wire_id, _ in lost:
            del self._running[wire_id]
        is_explained = False
        for _, sequence in lost:
            self._suspects.leave(sequence.request.request_id)
            if has_failed and self._ends_after_failure(sequence, reason):
                is_explained = True
            else:
                self._return(sequence, reason)
        self.pump()
        return is_explained

    def take_snapshot(self, name: str, *, blocks: Sequence[BlockStored], next_event_id: int) -> None:
        self.router.trie.load_snapshot(name, blocks=blocks, next_event_id=next_event_id)

    def take_step(self, name: str, step: StepOutput) -> bool:
        """Outputs to their streams, cache events to the router; False if events are missing."""
        for observer in self._observers:
            observer.on_step(name, step)
        complete = self.router.take_step(name, step)
        for output in step.sequences:
            sequence = self._running.get(output.request_id)
            if sequence is not None and sequence.replica == name:
                self._take_output(sequence, output)
        if self.num_queued and self.router.can_start(name):
            self.pump()
        return complete

    def _expected_pace(self) -> Pace:
        """Of the queue, before answers have ended while it was full."""
        name = next((name for name, replica in self._replicas.items() if replica.accepting), None)
        if name is None or not self._running:
            return Pace()
        answer_ms = self._charges.answer_ms(name)
        return Pace(wait_ms=answer_ms, gap_ms=answer_ms / len(self._running))

    def _next(self, candidates: Sequence[str]) -> SequenceState | None:
        if not self._suspects:
            return self._returned.pop() or self._queue.pop(_now_ms())
        with_room = [name for name in candidates if self.router.has_room(name)]
        returned = self._returned.pop(lambda num_failures: bool(self._open_to(num_failures, with_room)))
        return returned or (self._queue.pop(_now_ms()) if self._open_to(0, with_room) else None)

    def _open_to(self, num_failures: int, names: Sequence[str]) -> Sequence[str]:
        """Those of the replicas to which a sequence that has failed so often may be sent."""
        if not self._suspects:
            return names
        return [name for name in names if self._suspects.may_join(num_failures, self._replicas[name].group)]

    def _route(self, sequence: SequenceState, wire_id: str, candidates: Sequence[str]) -> None:
        """To the replica that the router chooses, or to those that are held for one."""
        self._expected.pop(sequence.request.request_id, None)
        num_failures = self._suspects.num_failures(sequence.request.request_id)
        candidates = self._open_to(num_failures, candidates)
        if num_failures:  # it must not wait for one where another suspect may run by then
            candidates = [name for name in candidates if self.router.has_room(name)]
        choice = self._place(sequence, wire_id, candidates, may_hold=not num_failures)
        if choice.is_held:
            sequence.wire_id = wire_id
            self._held[wire_id] = sequence
            asyncio.get_running_loop().call_later(self._hold_s, self.pump)  # it may have to go elsewhere by then
        else:
            self._replicas[choice.replica].target.submit(sequence.to_submit())

    def _place(self, sequence: SequenceState, wire_id: str, candidates: Sequence[str], *, may_hold: bool = True) -> Choice:
        """Give a run to the best of the candidates, in the books, unless it is held; the caller tells the replica."""
        candidates = self._versions.narrow(sequence, candidates)
        request = sequence.request
        num_known = len(request.prompt_token_ids) + len(sequence.output_token_ids)
        hashes = sequence.prompt_hashes
        if sequence.output_token_ids:
            known = (*request.prompt_token_ids, *sequence.output_token_ids)
            hashes = block_hashes(known, self._block_size, parent=root_hash(sequence.cache_salt))
        choice = self.router.route(
            wire_id,
            hashes=hashes,
            num_tokens=num_known,
            expected_output_tokens=self._charges.tokens_to_come(sequence),
            tick=_now_ms(),
            candidates=candidates,
            client_request_id=sequence.stream.request_id,
            tenant=sequence.stream.tenant.name,
            may_hold=may_hold and self._versions.is_single,  # who is held for one version does not go to another
        )
        if choice.is_held:
            return choice
        matched = next(score.matched_tokens for score in choice.scores if score.replica == choice.replica)
        self._charges.dispatched(sequence, choice.replica, num_cached=matched)
        sequence.dispatched(wire_id, choice.replica)
        self._suspects.join(request.request_id, self._replicas[choice.replica].group)
        self._running[wire_id] = sequence
        for observer in self._observers:
            observer.on_dispatch(sequence.stream.request_id, sequence.index, wire_id, choice.replica, choice.scores)
        return choice

    def _withdraw(self, sequence: SequenceState) -> None:
        """It neither runs nor waits afterwards; what its run still brings is for nobody."""
        self._abort(sequence)
        self._suspects.leave(sequence.request.request_id)
        if self._running.pop(sequence.wire_id, None) or self._held.pop(sequence.wire_id, None):
            self.router.finish(sequence.wire_id)
        self._returned.remove(sequence)

    def _take_output(self, sequence: SequenceState, output: SequenceOutput) -> None:
        reason = output.finish_reason
        if output.token_ids:
            sequence.num_refusals = 0
            if self._suspects:
                self._suspects.progress(sequence.request.request_id, len(output.token_ids))
        if reason is not None:
            del self._running[output.request_id]
            self._suspects.leave(sequence.request.request_id)
            self._charges.settle(sequence, num_output=output.offset + len(output.token_ids))
        stream = sequence.stream
        if stream.ended or sequence.finish_reason is not None:
            return
        try:
            if reason in (None, FinishReason.STOP, FinishReason.LENGTH):
                if stream.apply(sequence, output):
                    self._abort(sequence)
                elif reason is not None:
                    self._charges.learn_length(len(sequence.output_token_ids))
                return
            if output.token_ids:
                stream.apply(sequence, replace(output, finish_reason=None))
        except PilotfishError as error:
            stream.fail(error)
        if reason is FinishReason.ABORT and not sequence.abort_sent:
            self._take_back(sequence, output.error or f"{sequence.replica} gave it up")
        elif reason is FinishReason.DEADLINE:
            stream.expire()
        elif reason is FinishReason.ERROR:
            stream.fail(InternalError(output.error))

    def _ends_after_failure(self, sequence: SequenceState, reason: str) -> bool:
        """Whether its stream ends because its replica has died: that was one too many, and it was the only suspect."""
        name = sequence.request.request_id
        if sequence.stream.ended or sequence.finish_reason is not None or self._suspects.fail(name):
            return False
        sequence.stream.fail(
            PoisonousRequest(
                f"{name} was running on at least {self._max_attempts} replicas in a row when they died, the last time because "
                f"{reason}; it is not tried again, and the logs of their workers may say why they died"
            )
        )
        return True

    def _take_back(self, sequence: SequenceState, reason: str) -> None:
        """Its replica lives, but does not want it."""
        sequence.num_refusals += 1
        if sequence.num_refusals >= self._max_attempts:
            name, number = sequence.request.request_id, sequence.num_refusals
            sequence.stream.fail(InternalError(f"{name} was refused by workers {number} times, the last time because {reason}"))
        self._return(sequence, reason)

    def _return(self, sequence: SequenceState, reason: str) -> None:
        """To the front of the queue, unless nobody waits for it."""
        if sequence.stream.ended or sequence.finish_reason is not None:
            return
        name, num_known = sequence.request.request_id, len(sequence.output_token_ids)
        logger.warning(
            "%s goes on elsewhere after %d tokens: %s",
            name,
            num_known,
            reason,
            extra=logs.about(sequence.stream.request_id, replica=sequence.replica, num_tokens=num_known),
        )
        for observer in self._observers:
            observer.on_return(sequence.stream.request_id, sequence.index, sequence.wire_id, reason)
        self._returned.append(sequence, num_failures=self._suspects.num_failures(name))

    def _abort(self, sequence: SequenceState) -> None:
        if sequence.wire_id in self._running and not sequence.abort_sent:
            sequence.abort_sent = True
            self._replicas[sequence.replica].target.abort(sequence.wire_id)


def _now_ms() -> int:
    return int(time.monotonic() * 1000)
