"""Requests to replicas and outputs back: admission queue -> router -> link, and steps -> streams.

Binding is late: a sequence leaves the queue only when a replica has room for it. What runs where is known exactly, since every
submit and every last output passes here. A sequence whose replica is lost, or gives it up, goes back in front of the queue with
its known tokens. Everything runs on the controller's event loop.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..common.errors import InternalError, Overloaded, PilotfishError
from ..common.hashing import block_hashes, root_hash
from ..common.requests import BlockStored, EngineRequest, FinishReason, SequenceOutput, StepOutput
from ..scheduler.admission import AdmissionQueue
from ..scheduler.router import Router, RouterConfig
from ..scheduler.snapshot import RunningRequest
from .events import Observer
from .sequence_state import SequenceState
from .streams import RequestStream

logger = logging.getLogger(__name__)

_OUTPUT_PRIOR_TOKENS = 128.0
_OUTPUT_RATE = 0.05


class Target(Protocol):
    """What the dispatcher needs of a link."""

    connected: bool

    def submit(self, request: EngineRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...


@dataclass(slots=True)
class _Replica:
    target: Target
    capacity: int
    accepting: bool = False


class Dispatcher:
    """See the module's docstring. `num_queued` and `num_running` count sequences."""

    def __init__(self, *, max_queued: int, max_attempts: int, block_size: int, observers: Sequence[Observer] = ()) -> None:
        self.router = Router(RouterConfig(block_size=block_size))
        self._block_size = block_size
        self._max_queued = max_queued
        self._max_attempts = max_attempts
        self._observers = observers
        self._replicas: dict[str, _Replica] = {}
        self._queue: AdmissionQueue[SequenceState] = AdmissionQueue(max_queued=max_queued)
        self._returned: deque[SequenceState] = deque()
        self._running: dict[str, SequenceState] = {}
        self._expected: dict[str, SequenceState] = {}
        self._run_id = secrets.token_hex(4)
        self._num_submits = 0
        self._finish_times: deque[float] = deque(maxlen=64)
        self._expected_output_tokens = _OUTPUT_PRIOR_TOKENS

    @property
    def num_queued(self) -> int:
        return len(self._queue) + len(self._returned)

    @property
    def num_running(self) -> int:
        return len(self._running)

    # Requests.

    def check_room(self, num_arriving: int) -> None:
        """Refuse a request before any work is spent on it.

        Raises:
            Overloaded: as many requests as the queue may hold are on their way to it.
        """
        if num_arriving >= self._max_queued:
            raise Overloaded(f"{num_arriving} requests are being read already; try again in a second", retry_after_s=1.0)

    def enqueue(self, stream: RequestStream) -> None:
        """Queue all choices of a request.

        Raises:
            Overloaded: there is no room for all of them; the caller ends the stream, which takes out those that were queued.
        """
        for sequence in stream.sequences:
            self._queue.push(
                sequence,
                request_id=sequence.request.request_id,
                now_ms=_now_ms(),
                priority=sequence.request.priority,
                served_per_s=self._served_per_s(),
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
            if sequence in self._returned:
                self._returned.remove(sequence)
            self._place(sequence, run.request_id, [name])
            adopted[run.request_id] = sequence.to_submit()
        return adopted

    def resume(self, sequence: SequenceState, token_ids: Sequence[int]) -> None:
        """Go on with a choice of an earlier controller from what its client has, unless a worker has got as far.

        Raises:
            InvalidRequest: what the client has is not of this answer.
        """
        if len(token_ids) > len(sequence.output_token_ids) and sequence.wire_id in self._running:
            self._abort(sequence)
            self._forget(sequence)
        sequence.learn(token_ids)
        if sequence.finish_reason is None and sequence.wire_id not in self._running:
            self._returned.append(sequence)

    def release(self, stream: RequestStream) -> None:
        """A stream has ended: what is left of it leaves the queue, or is ended on its worker."""
        for sequence in stream.sequences:
            if self._expected.get(sequence.request.request_id) is sequence:
                del self._expected[sequence.request.request_id]
            self._queue.remove(sequence.request.request_id)
            self._abort(sequence)
        self._returned = deque(s for s in self._returned if s.stream is not stream)

    def fail_queued(self, error: PilotfishError) -> None:
        """No replica will ever take what is queued."""
        while (sequence := self._next()) is not None:
            sequence.stream.fail(error)

    def pump(self) -> None:
        """Hand out what is queued while a replica has room."""
        while self._returned or len(self._queue):
            candidates = [
                name
                for name, replica in self._replicas.items()
                if replica.accepting and replica.target.connected and self.router.num_active(name) < replica.capacity
            ]
            sequence = self._next() if candidates else None
            if sequence is None:
                return
            self._submit(sequence, candidates)

    # Replicas.

    def add_replica(self, name: str, target: Target, *, max_num_seqs: int) -> None:
        """From `start_accepting` on the replica gets requests while it is connected: a few more than it runs at once, so that a
        freed place is taken in the next step."""
        self.router.add_replica(name)
        self._replicas[name] = _Replica(target, capacity=max_num_seqs + max(1, max_num_seqs // 8))

    def start_accepting(self, name: str) -> None:
        """The caller calls `pump` when all have started that start together."""
        self._replicas[name].accepting = True

    def stop_accepting(self, name: str) -> None:
        """Nothing new for this replica; what runs there goes on."""
        self._replicas[name].accepting = False

    def remove_replica(self, name: str, reason: str) -> None:
        """The replica is gone; what ran there runs elsewhere, or ends with an error after too many attempts."""
        del self._replicas[name]
        self.router.remove_replica(name)
        lost = [(wire_id, sequence) for wire_id, sequence in self._running.items() if sequence.replica == name]
        for wire_id, _ in lost:
            del self._running[wire_id]
        for _, sequence in lost:
            self._return(sequence, reason)
        self.pump()

    def take_snapshot(self, name: str, *, blocks: Sequence[BlockStored], next_event_id: int) -> None:
        self.router.trie.load_snapshot(name, blocks=blocks, next_event_id=next_event_id)

    def take_step(self, name: str, step: StepOutput) -> bool:
        """Outputs to their streams, cache events to the router; False if events are missing."""
        has_ended = False
        for output in step.sequences:
            sequence = self._running.get(output.request_id)
            if sequence is not None and sequence.replica == name:
                self._take_output(sequence, output)
                has_ended = has_ended or output.finish_reason is not None
        self.router.step_times.observe(name, num_tokens=step.num_batched_tokens, step_ms=step.timings.total_ms)
        complete = not step.kv_events or self.router.trie.apply(name, first_event_id=step.first_event_id, events=step.kv_events)
        for observer in self._observers:
            observer.on_step(name, step)
        if has_ended:
            self.pump()
        return complete

    def _next(self) -> SequenceState | None:
        return self._returned.popleft() if self._returned else self._queue.pop_ready(_now_ms())

    def _submit(self, sequence: SequenceState, candidates: Sequence[str]) -> None:
        self._num_submits += 1
        self._expected.pop(sequence.request.request_id, None)
        wire_id = f"{sequence.request.request_id}~{self._run_id}.{self._num_submits}"
        self._place(sequence, wire_id, candidates)
        self._replicas[sequence.replica].target.submit(sequence.to_submit())

    def _place(self, sequence: SequenceState, wire_id: str, candidates: Sequence[str]) -> None:
        """Give a run to the best of the candidates, in the books."""
        request = sequence.request
        known = (*request.prompt_token_ids, *sequence.output_token_ids)
        hashes = sequence.prompt_hashes
        if sequence.output_token_ids:
            hashes = block_hashes(known, self._block_size, parent=root_hash(request.salt))
        tokens_left = request.sampling.max_tokens - len(sequence.output_token_ids)
        choice = self.router.route(
            wire_id,
            hashes=hashes,
            num_tokens=len(known),
            expected_output_tokens=min(tokens_left, self._expected_output_tokens),
            tick=_now_ms(),
            candidates=candidates,
        )
        logger.debug("%s goes to %s: %s", wire_id, choice.replica, choice.scores)
        sequence.dispatched(wire_id, choice.replica)
        self._running[wire_id] = sequence

    def _forget(self, sequence: SequenceState) -> None:
        """What its run still brings is for nobody."""
        del self._running[sequence.wire_id]
        self.router.finish(sequence.wire_id)

    def _take_output(self, sequence: SequenceState, output: SequenceOutput) -> None:
        reason = output.finish_reason
        if reason is not None:
            del self._running[output.request_id]
            self.router.finish(output.request_id)
            self._finish_times.append(time.monotonic())
        elif sequence.awaits_first_token:
            self.router.first_token(output.request_id)
        sequence.awaits_first_token = False
        stream = sequence.stream
        if stream.ended or sequence.finish_reason is not None:
            return
        try:
            if reason in (None, FinishReason.STOP, FinishReason.LENGTH):
                if stream.apply(sequence, output):
                    self._abort(sequence)
                elif reason is not None:
                    self._expected_output_tokens += _OUTPUT_RATE * (
                        len(sequence.output_token_ids) - self._expected_output_tokens
                    )
                return
            if output.token_ids:
                stream.apply(sequence, replace(output, finish_reason=None))
        except PilotfishError as error:
            stream.fail(error)
        if reason is FinishReason.ABORT and not sequence.abort_sent:
            self._return(sequence, output.error or f"{sequence.replica} gave it up")
        elif reason is FinishReason.DEADLINE:
            stream.expire()
        elif reason is FinishReason.ERROR:
            stream.fail(InternalError(output.error))

    def _return(self, sequence: SequenceState, reason: str) -> None:
        """To the front of the queue, unless nobody waits for it or it has lost too many replicas."""
        if sequence.stream.ended or sequence.finish_reason is not None:
            return
        name, num_known = sequence.request.request_id, len(sequence.output_token_ids)
        if sequence.num_attempts >= self._max_attempts:
            sequence.stream.fail(
                InternalError(f"{name} lost its replica {sequence.num_attempts} times, the last time because {reason}")
            )
            return
        logger.warning("%s goes on elsewhere after %d tokens: %s", name, num_known, reason)
        self._returned.append(sequence)

    def _abort(self, sequence: SequenceState) -> None:
        if sequence.wire_id in self._running and not sequence.abort_sent:
            sequence.abort_sent = True
            self._replicas[sequence.replica].target.abort(sequence.wire_id)

    def _served_per_s(self) -> float:
        times = self._finish_times
        return (len(times) - 1) / max(time.monotonic() - times[0], 1e-3) if len(times) > 1 else 0.0


def _now_ms() -> int:
    return int(time.monotonic() * 1000)
