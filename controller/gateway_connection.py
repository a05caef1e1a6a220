"""The controller's half of the connection to one gateway process: takes what its clients want, and says what came of it.

A request of a gateway is one of the controller's own, whose reader is here: it is woken as any other, and what it has not said
yet goes down in one message a tick, with what all other requests of that gateway have. There is no queue: a slow gateway gets
fewer, larger messages. When the connection breaks, its requests wait for the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ..common import logs
from ..common.cluster_state import ClusterState
from ..common.errors import Cancelled, InternalError, InvalidRequest, PilotfishError
from ..common.requests import FinishReason
from ..proto import gateway_pb2 as pb
from ..proto.cluster_codec import status_to_proto
from ..proto.codec import finish_reason_from_proto
from ..proto.gateway_codec import ChoiceRun, add_row, failure_from_proto, failure_to_proto
from .choice_text import tokens_only
from .front_end import Prepared
from .intake import Arrival, Intake
from .journal import prepared_of
from .sequence_state import Position, Received
from .streams import RequestStream

logger = logging.getLogger(__name__)


def typed(error: Exception, request_id: str) -> PilotfishError:
    """An error to answer with; a defect's details are in the log."""
    if isinstance(error, PilotfishError):
        return error
    logger.exception("a request of a gateway failed", exc_info=error, extra=logs.about(request_id))
    return InternalError(f"pilotfish failed ({type(error).__name__}); the controller's log has the details")


def _superseded(request_id: str) -> Cancelled:
    return Cancelled(f"request {request_id} is read by another call, which resumed it")


class GatewayReader:
    """The Reader of a request for a gateway; see streams.py. It is its own Wake."""

    def __init__(
        self, connection: GatewayConnection, number: int, stream: RequestStream, positions: Sequence[Position]
    ) -> None:
        self.connection = connection
        self.number = number
        self.stream = stream
        self._positions = positions
        self._told_attempts = [0] * len(positions)

    @property
    def wake(self) -> GatewayReader:
        return self

    def set(self) -> None:
        self.connection.mark(self)

    def supersede(self) -> None:
        self.connection.end(self.number, _superseded(self.stream.request_id))

    def position(self, index: int) -> Position:
        return self._positions[index]

    def collect(self, tick: pb.ControllerTick) -> bool:
        """Add what was not said yet; True if there will be no more."""
        stream = self.stream
        for sequence, position in zip(stream.sequences, self._positions, strict=True):
            delta = sequence.delta_from(position)
            if delta is None:
                continue
            run = None
            if self._told_attempts[sequence.index] != sequence.num_attempts:
                self._told_attempts[sequence.index] = sequence.num_attempts
                run = ChoiceRun(sequence.replica, sequence.num_attempts, sequence.cached_tokens or 0, stream.queue_ms)
            add = partial(add_row, tick.outputs, self.number, sequence.index)
            offset, token_ids, num_without = delta.offset, delta.token_ids, 0
            if delta.logprobs and len(delta.logprobs) < len(token_ids):  # an earlier controller had those of the first ones
                num_without = len(token_ids) - len(delta.logprobs)
                add(offset=offset, token_ids=token_ids[:num_without], finish_reason=None, run=run)
                run = None
            add(
                offset=offset + num_without,
                token_ids=token_ids[num_without:],
                finish_reason=delta.finish_reason,
                logprobs=delta.logprobs,
                run=run,
            )
        if stream.ended and stream.error is not None:
            tick.ended.add(number=self.number, failure=failure_to_proto(stream.error))
        return stream.ended


class GatewayConnection:
    """See the module's docstring.

    Attributes:
        hello: who is at the other end.
        last_message_time: of the monotonic clock.
    """

    def __init__(self, hello: pb.GatewayHello, intake: Intake) -> None:
        self.hello = hello
        self.last_message_time = time.monotonic()
        self._intake = intake
        self._readers: dict[int, GatewayReader] = {}
        self._marked: dict[GatewayReader, None] = {}
        self._next = pb.ControllerTick()
        self._wake = asyncio.Event()
        self._is_idle = False

    @property
    def num_streams(self) -> int:
        return len(self._readers)

    def mark(self, reader: GatewayReader) -> None:
        """There may be more to say of its request."""
        self._marked[reader] = None
        self._wake.set()

    def end(self, number: int, error: PilotfishError) -> None:
        """There will be nothing more under that number."""
        self._readers.pop(number, None)
        self._next.ended.add(number=number, failure=failure_to_proto(error))
        self._wake.set()

    def show(self, state: ClusterState) -> None:
        """Say how the cluster is."""
        view = pb.ClusterView(status=status_to_proto(state), is_serving=self._intake.is_serving)
        try:
            limits = self._intake.limits()
            view.limits.max_model_len, view.limits.vocab_size = limits.max_model_len, limits.vocab_size
            view.limits.kv_capacity_tokens = limits.kv_capacity_tokens
        except PilotfishError as error:
            view.unavailable.CopyFrom(failure_to_proto(error))
        self._next.cluster.CopyFrom(view)
        self._wake.set()

    async def next_tick(self) -> pb.ControllerTick:
        """All there is to say, as soon as there is anything."""
        self._is_idle = True
        await self._wake.wait()
        self._wake.clear()
        self._is_idle = False
        tick, self._next = self._next, pb.ControllerTick()
        marked, self._marked = self._marked, {}
        for reader in marked:
            if self._readers.get(reader.number) is reader and reader.collect(tick):
                del self._readers[reader.number]
        return tick

    @property
    def is_flushed(self) -> bool:
        """All was handed to the transport."""
        return self._is_idle and not self._wake.is_set()

    async def take(self, message: pb.GatewayMessage) -> None:
        self.last_message_time = time.monotonic()
        for code, count in message.refused.items():
            for _ in range(count):
                self._intake.count_refused(code)
        for submit in message.submits:
            try:
                await self._submit(submit)
            except Exception as error:  # noqa: BLE001 - a process's edge: logged and answered
                self.end(submit.number, typed(error, submit.entry.request_id))
        for resume in message.resumes:
            try:
                self._resume(resume)
            except Exception as error:  # noqa: BLE001 - a process's edge: logged and answered
                self.end(resume.number, typed(error, resume.request_id))
        for stopped in message.stopped:
            if (reader := self._readers.get(stopped.number)) is not None:
                self._stop(reader, stopped.choice, num_tokens=stopped.num_tokens, reason=stopped.stop_reason)
        for ended in message.ended:
            if (reader := self._readers.pop(ended.number, None)) is not None:
                if ended.left and reader.stream.is_resumable:
                    reader.stream.leave(reader)
                else:
                    reader.stream.fail(failure_from_proto(ended.failure))

    def close(self) -> None:
        """The connection is gone: its requests wait for another."""
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            reader.stream.leave(reader)

    async def _submit(self, submit: pb.GatewaySubmit) -> None:
        entry = submit.entry
        arrival = Arrival(
            request_id=entry.request_id,
            timeout_s=submit.timeout_s,
            age_s=submit.age_s,
            priority=entry.choices[0].priority,
            tenant=self._intake.tenants.named(entry.tenant),
            retry_key=submit.retry_key,
            trace_headers=submit.trace_headers,
            resumable=submit.resumable,
            is_more=submit.is_more,
            entry=entry,
        )
        if submit.again:
            self._submit_again(submit, arrival)
            return

        async def prepare() -> Prepared:
            return self._prepared(submit)

        stream = await self._intake.admit(arrival, prepare)
        self._next.taken.add(number=submit.number)
        self._attach(submit.number, stream, [Position() for _ in stream.sequences])

    def _submit_again(self, submit: pb.GatewaySubmit, arrival: Arrival) -> None:
        """The gateway had this request before a break, of the connection or of the controller."""
        stream = self._intake.streams.get_kept(arrival.request_id)
        if stream is None:
            stream = self._intake.readmit(arrival, self._prepared(submit))
        elif stream.tenant.name != arrival.tenant.name:
            raise InvalidRequest(f"request_id {arrival.request_id!r} is in flight already, of another tenant")
        elif isinstance(stream.reader, GatewayReader) and stream.reader.connection.hello.name != self.hello.name:
            raise _superseded(arrival.request_id)
        self._intake.streams.take_up(stream, [Received(tuple(choice.token_ids)) for choice in submit.choices])
        self._next.taken.add(number=submit.number)
        positions = [
            Position(num_tokens=len(choice.token_ids), has_end=finish_reason_from_proto(choice.finish_reason) is not None)
            for choice in submit.choices
        ]
        reader = self._attach(submit.number, stream, positions)
        for index, choice in enumerate(submit.choices):
            if finish_reason_from_proto(choice.finish_reason) is FinishReason.STOP:
                self._stop(reader, index, num_tokens=len(choice.token_ids), reason=choice.stop_reason)

    def _resume(self, resume: pb.GatewayResume) -> None:
        """A client has come back, here: the gateway gets the request, and all its tokens."""
        stream = self._intake.streams.find(resume.request_id, tenant=self._intake.tenants.named(resume.tenant))
        received = [Received(tuple(choice.token_ids)) for choice in resume.choices]
        self._intake.streams.take_up(stream, received)
        for sequence, known in zip(stream.sequences, received, strict=True):
            sequence.position_after(known)  # raises
        self._next.taken.add(number=resume.number, entry=stream.entry, timeout_s=stream.timeout_s, age_s=stream.age_s)
        self._attach(resume.number, stream, [Position() for _ in stream.sequences])

    def _attach(self, number: int, stream: RequestStream, positions: Sequence[Position]) -> GatewayReader:
        reader = self._readers[number] = GatewayReader(self, number, stream, positions)
        stream.attach(reader)
        self.mark(reader)
        return reader

    def _stop(self, reader: GatewayReader, index: int, *, num_tokens: int, reason: str) -> None:
        position = reader.position(index)
        position.num_tokens, position.has_end = num_tokens, True  # the gateway knows
        self._intake.stop(reader.stream, index, num_tokens=num_tokens, reason=reason)

    def _prepared(self, submit: pb.GatewaySubmit) -> Prepared:
        prepared = prepared_of(submit.entry, make_text=tokens_only, block_size=None)
        return replace(prepared, prompt_hashes=tuple(submit.prompt_hashes), version=submit.model_version)
