"""The Worker service: one controller's stream of submits, aborts and acks down and steps up. All of it on one event loop.

What the controller has not acknowledged is held (outbox.py) and sent again when it, or its successor, attaches. Where it
cannot follow, the engine pauses (backpressure.py). When it has been away for `away_timeout_s`, or the outbox is full all the
same, running requests are aborted: their tokens up to then are held, and the ABORT that the controller did not ask for tells it
to replay them elsewhere. Nothing is dropped in silence, nothing grows without a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from ..common.errors import PilotfishError
from ..common.identity import CONTROLLER_NAME
from ..common.requests import EngineLoad, EngineRequest, FinishReason, SequenceOutput, StepOutput, WorkerInfo
from ..proto import worker_pb2
from ..proto.codec import info_to_proto, load_to_proto, request_from_proto
from ..proto.credentials import peer_name
from .backpressure import Backpressure
from .engine_interface import FAILED_PHASE, EngineInterface
from .outbox import StepOutbox, step_message

logger = logging.getLogger(__name__)

SERVICE_NAME = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLimits:
    """Bounds of the service.

    Attributes:
        pause_bytes, resume_bytes: unacknowledged output at which the engine pauses, and at which it goes on. A token takes some
            50: ten seconds of a busy replica.
        outbox_bytes: unacknowledged output held; at this size running requests are aborted. The pause comes long before.
        away_timeout_s: how long requests run on without a controller.
        heartbeat_interval_s: how often the engine's state goes up, whether steps end or not.
        attach_timeout_s: the first message of a controller is due in this time.
    """

    pause_bytes: int = 8 * 1024 * 1024
    resume_bytes: int = 4 * 1024 * 1024
    outbox_bytes: int = 64 * 1024 * 1024
    away_timeout_s: float = 60.0
    heartbeat_interval_s: float = 1.0
    attach_timeout_s: float = 10.0


class _Connection:
    """One Connect call: how far it has sent, and answers outside of steps that wait to be sent."""

    def __init__(self, controller_id: str, position: int) -> None:
        self.controller_id = controller_id
        self.position = position
        self.answers: list[bytes] = []
        self.heartbeat_is_due = False
        self.wake = asyncio.Event()
        self.closed = False

    def close(self) -> None:
        self.closed = True
        self.wake.set()

    async def beat(self, interval_s: float) -> None:
        while not self.closed:
            await asyncio.sleep(interval_s)
            self.heartbeat_is_due = True
            self.wake.set()


Context: TypeAlias = grpc.aio.ServicerContext


class WorkerService:
    """See the module's docstring. Lives on the server's event loop; only the engine's own methods are thread-safe."""

    def __init__(self, engine: EngineInterface, info: WorkerInfo, *, limits: ServerLimits) -> None:
        self._engine = engine
        self._info = info
        self._limits = limits
        self._outbox = StepOutbox(limits.outbox_bytes)
        self._backpressure = Backpressure(pause_bytes=limits.pause_bytes, resume_bytes=limits.resume_bytes, pause=engine.pause)
        self._running: dict[str, None] = {}
        self._ended_unacknowledged: set[str] = set()
        self._connection: _Connection | None = None
        self._load = EngineLoad(num_free_blocks=info.num_blocks)
        self._draining = False
        self._given_up = ""  # why running requests were aborted; no submit is taken until the controller has caught up
        self._idle = asyncio.Event()
        self._away_timer: asyncio.TimerHandle | None = None

    def handlers(self) -> grpc.GenericRpcHandler:
        """For a server. What goes up is encoded already: the outbox keeps bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Connect": grpc.stream_stream_rpc_method_handler(
                    self.Connect, request_deserializer=worker_pb2.ControllerMessage.FromString
                ),
                "Snapshot": grpc.unary_unary_rpc_method_handler(
                    self.Snapshot,
                    request_deserializer=worker_pb2.SnapshotRequest.FromString,
                    response_serializer=worker_pb2.SnapshotResponse.SerializeToString,
                ),
                "Drain": grpc.unary_unary_rpc_method_handler(
                    self.Drain,
                    request_deserializer=worker_pb2.DrainRequest.FromString,
                    response_serializer=worker_pb2.DrainResponse.SerializeToString,
                ),
            },
        )

    def receive(self, step: StepOutput) -> None:
        """Take a step of the engine."""
        finished = tuple(output.request_id for output in step.sequences if output.finish_reason is not None)
        for request_id in finished:
            self._running.pop(request_id, None)
            self._ended_unacknowledged.add(request_id)
        self._load = step.load
        self._outbox.append(step, finished)
        self._backpressure.look_at(self._outbox.num_bytes)
        if self._outbox.is_full and not self._given_up:
            self._give_up(f"the controller left {self._outbox.num_bytes} bytes of output unacknowledged")
        if not self._running:
            self._idle.set()
        if self._connection is not None:
            self._connection.wake.set()

    def close(self) -> None:
        """End the connection; the engine is stopped by its owner."""
        if self._connection is not None:
            self._connection.close()
        self._disarm_away_timer()

    async def Connect(
        self,
        request_iterator: AsyncIterator[worker_pb2.ControllerMessage],
        context: Context,
    ) -> None:
        await _check_caller(context)
        attach = await self._attach(request_iterator, context)
        self._disarm_away_timer()
        self._acknowledge(attach.acked_step_id)
        connection = _Connection(attach.controller_id, self._outbox.first_position)
        if self._connection is not None:
            logger.info("controller %s replaces %s", attach.controller_id, self._connection.controller_id)
            self._connection.close()
        self._connection = connection
        hello = worker_pb2.Hello(info=info_to_proto(self._info), step_id=self._outbox.last_step_id)
        await context.write(worker_pb2.WorkerMessage(hello=hello).SerializeToString())
        helpers = [
            asyncio.create_task(self._read(request_iterator, connection)),
            asyncio.create_task(connection.beat(self._limits.heartbeat_interval_s)),
        ]
        try:
            await self._send(context, connection)
        finally:
            for helper in helpers:
                helper.cancel()
            if self._connection is connection:
                self._connection = None
                logger.warning("controller %s is gone; %d requests run on", connection.controller_id, len(self._running))
                self._arm_away_timer()

    async def Snapshot(
        self,
        request: worker_pb2.SnapshotRequest,  # noqa: ARG002 - it has no fields
        context: Context,
    ) -> worker_pb2.SnapshotResponse:
        await _check_caller(context)
        snapshot = await asyncio.to_thread(self._engine.snapshot)
        return worker_pb2.SnapshotResponse(
            epoch=self._info.epoch,
            step_id=snapshot.step_id,
            next_event_id=snapshot.scheduler.next_event_id,
            block_hashes=[block.block_hash for block in snapshot.scheduler.blocks],
            parent_hashes=[block.parent_hash for block in snapshot.scheduler.blocks],
            requests=[
                worker_pb2.RunningRequest(
                    request_id=running.request_id,
                    num_prompt_tokens=running.num_prompt_tokens,
                    num_output_tokens=running.num_output_tokens,
                    output_token_ids=running.output_token_ids,
                )
                for running in snapshot.scheduler.requests
            ],
            info=info_to_proto(self._info),
        )

    async def Drain(
        self,
        request: worker_pb2.DrainRequest,  # noqa: ARG002 - it has no fields
        context: Context,
    ) -> worker_pb2.DrainResponse:
        await _check_caller(context)
        self._draining = True
        time_left_s = context.time_remaining()
        self._idle.clear()
        if self._running:
            # The answer leaves a little before the caller's deadline, or the count would be lost.
            timeout_s = None if time_left_s is None else max(0.0, time_left_s - 0.1)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
        return worker_pb2.DrainResponse(num_left=len(self._running))

    async def _attach(
        self,
        messages: AsyncIterator[worker_pb2.ControllerMessage],
        context: Context,
    ) -> worker_pb2.Attach:
        try:
            async with asyncio.timeout(self._limits.attach_timeout_s):
                first = await anext(messages)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be Attach")
        if not first.HasField("attach"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be Attach")
        if first.attach.epoch != self._info.epoch:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this worker belongs to epoch {self._info.epoch}, not {first.attach.epoch}",
            )
        return first.attach

    async def _read(self, messages: AsyncIterator[worker_pb2.ControllerMessage], connection: _Connection) -> None:
        try:
            async for message in messages:
                if connection.closed:
                    return
                for submit in message.submits:
                    self._submit(request_from_proto(submit), connection)
                for abort in message.aborts:
                    self._abort(abort.request_id, connection)
                if message.HasField("ack"):
                    self._acknowledge(message.ack.step_id)
        finally:
            connection.close()

    async def _send(
        self,
        context: Context,
        connection: _Connection,
    ) -> None:
        while not connection.closed:
            connection.wake.clear()
            answers, connection.answers = connection.answers, []
            for answer in answers:
                await context.write(answer)
            connection.position = max(connection.position, self._outbox.first_position)
            while not connection.closed:
                data, num_steps = self._outbox.message_from(connection.position)
                if not num_steps:
                    break
                connection.position += num_steps
                await context.write(data)
                connection.position = max(connection.position, self._outbox.first_position)
            if connection.heartbeat_is_due:
                connection.heartbeat_is_due = False
                await context.write(worker_pb2.WorkerMessage(heartbeat=self._heartbeat()).SerializeToString())
            await connection.wake.wait()

    def _submit(self, request: EngineRequest, connection: _Connection) -> None:
        request_id = request.request_id
        if request_id in self._running or request_id in self._ended_unacknowledged:
            return  # sent again after a reconnection: its output is on the way
        if self._draining or self._given_up:
            self._answer(connection, request_id, self._given_up or "the worker is draining")
            return
        try:
            self._engine.submit(request)
        except PilotfishError as error:
            self._answer(connection, request_id, error.message)
            return
        self._running[request_id] = None

    def _abort(self, request_id: str, connection: _Connection) -> None:
        if request_id in self._running:
            self._engine.abort(request_id)
        elif request_id not in self._ended_unacknowledged:
            self._answer(connection, request_id, "the request is not known here")

    def _answer(self, connection: _Connection, request_id: str, message: str) -> None:
        """ABORT outside of the steps: step id 0, neither held nor acknowledged; the controller may send its message again."""
        output = SequenceOutput(request_id=request_id, offset=0, finish_reason=FinishReason.ABORT, error=message)
        connection.answers.append(step_message(StepOutput(step_id=0, sequences=(output,), load=self._load)))
        connection.wake.set()

    def _acknowledge(self, step_id: int) -> None:
        self._ended_unacknowledged.difference_update(self._outbox.acknowledge(step_id))
        self._backpressure.look_at(self._outbox.num_bytes)
        if not self._outbox.is_full:
            self._given_up = ""

    def _give_up(self, reason: str) -> None:
        logger.warning("aborting %d running requests: %s", len(self._running), reason)
        self._given_up = reason
        for request_id in self._running:
            self._engine.abort(request_id)

    def _arm_away_timer(self) -> None:
        timeout_s = self._limits.away_timeout_s
        reason = f"the controller has been away for {timeout_s:g} s"
        self._away_timer = asyncio.get_running_loop().call_later(timeout_s, self._give_up, reason)

    def _disarm_away_timer(self) -> None:
        if self._away_timer is not None:
            self._away_timer.cancel()
            self._away_timer = None

    def _heartbeat(self) -> worker_pb2.Heartbeat:
        health = self._engine.health()
        return worker_pb2.Heartbeat(
            step_id=health.step_id,
            busy=health.step_age_s > 0,
            step_age_s=health.step_age_s,
            phase=health.phase,
            load=load_to_proto(self._load),
            failed=health.phase == FAILED_PHASE,
            message=health.message,
            paused_s=self._backpressure.paused_s,
        )


async def _check_caller(context: Context) -> None:
    """A worker's certificate is good for its own port and its leader's, not for passing as the controller."""
    if (name := peer_name(context)) != CONTROLLER_NAME:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"only the controller may call a worker, not {name!r}")
