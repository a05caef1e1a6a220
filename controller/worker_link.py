"""The controller's one stream to a worker: submits and aborts down, steps up, and what it takes to lose nothing.

Life: `run` connects and, as long as the worker lives, connects again after every break; `close` ends it. What was sent and has
not ended is sent again after a break, and the worker ignores what it knows; the worker sends again what was not acknowledged,
and step ids tell what was seen. The first attachment starts from a snapshot of the worker's prefix cache; a gap in the
cache's events leads to another one. Everything runs on the controller's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import grpc

from ..common.identity import Identity
from ..common.requests import EngineLoad, EngineRequest, StepOutput
from ..proto import worker_pb2, worker_pb2_grpc
from ..proto.codec import fill_request, load_from_proto, step_from_proto
from ..proto.credentials import channel_credentials, channel_options, explain
from ..scheduler.snapshot import RunningRequest

logger = logging.getLogger(__name__)

_CHANNEL_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),  # the snapshot of a large prefix cache
    ("grpc.use_local_subchannel_pool", 1),  # a new channel connects at once, whatever an earlier one met
]
_CALL_TIMEOUT_S = 10.0
_MAX_JOINED_TOKENS = 250_000  # a megabyte at most
_ACK_INTERVAL_S = 0.5
_ACK_STEPS = 64
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class WorkerUnfit(Exception):
    """There is no use in connecting again: the worker is of another epoch, or has lost steps."""


class LinkListener(Protocol):
    """Who receives what the link brings."""

    def on_snapshot(
        self, snapshot: worker_pb2.SnapshotResponse, orphans: Sequence[RunningRequest]
    ) -> Mapping[str, EngineRequest]:
        """`orphans` run there, but were not submitted over this link. Returns those that go on; the others are ended."""

    def on_connected(self) -> None: ...

    def on_step(self, step: StepOutput) -> bool:
        """False asks for a new snapshot: prefix-cache events are missing."""


class WorkerLink:
    """See the module's docstring.

    Attributes:
        connected: the worker has greeted; what is submitted now leaves now.
        last_message_time: of the monotonic clock.
        load, step_id, step_age_s, failed, failure: as of the last message; `step_age_s` is 0 when no step runs, `failed` says
            that the engine cannot go on, `failure` why, `phase` what it was doing.
        paused_s: how long the engine has paused in all since what it had made was not acknowledged.
    """

    def __init__(
        self,
        *,
        address: str,
        peer: str,
        identity: Identity,
        epoch: int,
        controller_id: str,
        silence_timeout_s: float,
        listener: LinkListener,
    ) -> None:
        """`peer` is the name in the worker's certificate, `identity` what is shown to it. A connection that brings nothing for
        `silence_timeout_s` is broken, whatever the transport thinks."""
        self.address = address
        self.connected = False
        self.last_message_time = time.monotonic()
        self.load = EngineLoad()
        self.step_id = 0
        self.step_age_s = 0.0
        self.failed = False
        self.failure = ""
        self.phase = ""
        self.paused_s = 0.0
        self._peer = peer
        self._identity = identity
        self._epoch = epoch
        self._controller_id = controller_id
        self._silence_timeout_s = silence_timeout_s
        self._listener = listener
        self._needs_snapshot = True
        self._in_flight: dict[str, EngineRequest] = {}
        self._aborted: set[str] = set()
        self._orphans: list[str] = []
        self._outgoing: deque[worker_pb2.ControllerMessage] = deque()
        self._num_tokens = 0  # in the last of them
        self._outgoing_wake = asyncio.Event()
        self._acked_step_id = 0
        self._ack_timer: asyncio.TimerHandle | None = None

    def submit(self, request: EngineRequest) -> None:
        """Hand a request to the worker; its outputs come through the listener until one has a finish reason."""
        self._in_flight[request.request_id] = request
        self._say_submit(request)

    def abort(self, request_id: str) -> None:
        """Ask the worker to end a request; its last output still comes."""
        self._aborted.add(request_id)
        self._say_abort(request_id)

    async def run(self) -> None:
        """Stay connected until cancelled.

        Raises:
            WorkerUnfit: there is no use in trying again.
        """
        num_failures = 0
        while True:
            received_before = self.last_message_time
            try:
                await self._serve_one_connection()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
                if isinstance(error, grpc.aio.AioRpcError) and error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                    raise WorkerUnfit(error.details()) from error
                logger.info("worker %s: the connection broke: %s", self.address, _describe(error))
            finally:
                self._disconnected()
            num_failures = 0 if self.last_message_time > received_before else num_failures + 1
            await asyncio.sleep(_BACKOFF_S[min(num_failures, len(_BACKOFF_S) - 1)])

    async def _serve_one_connection(self) -> None:
        options = [*_CHANNEL_OPTIONS, *channel_options(self._peer)]
        async with grpc.aio.secure_channel(self.address, channel_credentials(self._identity), options=options) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            if self._needs_snapshot:
                await self._take_snapshot(stub)
            call = stub.Connect()
            tasks = [asyncio.create_task(work) for work in (self._read(call), self._write(call), self._watch_silence())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task in done:
                        task.result()
            finally:
                for task in tasks:
                    task.cancel()
                call.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        """Until the worker or a failure ends the call, or a new snapshot is needed."""
        while not self._needs_snapshot:
            message = await call.read()
            if message is grpc.aio.EOF:
                return
            self.last_message_time = time.monotonic()
            for step in message.steps:
                self._take_step(step)
            if message.HasField("heartbeat"):
                beat = message.heartbeat
                self.load, self.step_age_s, self.failed = load_from_proto(beat.load), beat.step_age_s, beat.failed
                self.failure, self.phase, self.paused_s = beat.message, beat.phase, beat.paused_s
            if message.HasField("hello"):
                self._greeted()

    def _greeted(self) -> None:
        """The worker may have missed anything that was sent before the break: say it again."""
        self.connected = True
        for request_id in self._orphans:
            self._say_abort(request_id)
        for request_id, request in self._in_flight.items():
            self._say_submit(request)
            if request_id in self._aborted:
                self._say_abort(request_id)
        self._listener.on_connected()

    def _take_step(self, message: worker_pb2.Step) -> None:
        if message.step_id:  # 0: an answer outside of the steps
            if message.step_id <= self.step_id:
                return
            if message.step_id != self.step_id + 1:
                raise WorkerUnfit(f"after step {self.step_id} it sent step {message.step_id}")
            self.step_id = message.step_id
            self._acknowledge_later()
        step = step_from_proto(message)
        self.load, self.step_age_s = step.load, 0.0
        for output in step.sequences:
            if output.finish_reason is not None:
                self._in_flight.pop(output.request_id, None)
                self._aborted.discard(output.request_id)
        if not self._listener.on_step(step):
            logger.warning("worker %s: prefix-cache events are missing; taking a snapshot", self.address)
            self._needs_snapshot = True

    async def _take_snapshot(self, stub: worker_pb2_grpc.WorkerStub) -> None:
        snapshot = await stub.Snapshot(worker_pb2.SnapshotRequest(), timeout=_CALL_TIMEOUT_S)
        if snapshot.epoch != self._epoch:
            raise WorkerUnfit(f"the worker belongs to epoch {snapshot.epoch}, not {self._epoch}")
        self._needs_snapshot = False
        if self.step_id == 0:  # what came before was for another controller
            self.step_id = self._acked_step_id = snapshot.step_id
        orphans = [
            RunningRequest(running.request_id, running.num_prompt_tokens, tuple(running.output_token_ids))
            for running in snapshot.requests
            if running.request_id not in self._in_flight
        ]
        self._in_flight.update(self._listener.on_snapshot(snapshot, orphans))
        self._orphans = [running.request_id for running in orphans if running.request_id not in self._in_flight]

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        attach = worker_pb2.Attach(epoch=self._epoch, acked_step_id=self.step_id, controller_id=self._controller_id)
        await call.write(worker_pb2.ControllerMessage(attach=attach))
        while True:
            while self._outgoing:
                await call.write(self._outgoing.popleft())
            self._outgoing_wake.clear()
            await self._outgoing_wake.wait()

    async def _watch_silence(self) -> None:
        opened, timeout_s = time.monotonic(), self._silence_timeout_s
        while time.monotonic() - max(opened, self.last_message_time) < timeout_s:  # noqa: ASYNC110 - silence is no event
            await asyncio.sleep(timeout_s / 4)
        raise TimeoutError(f"nothing came for {timeout_s:g} s")

    def _say_submit(self, request: EngineRequest) -> None:
        if self.connected:
            num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
            fill_request(self._message(num_tokens).submits.add(), request)

    def _say_abort(self, request_id: str) -> None:
        if self.connected:
            self._message().aborts.add(request_id=request_id)

    def _message(self, num_tokens: int = 0) -> worker_pb2.ControllerMessage:
        """What is said next goes in here: with all that is said before the one on its way has left, since a message costs
        more than what is in it. Nothing is kept for a broken connection: the greeting of the next one says it again."""
        self._num_tokens += num_tokens
        if not self._outgoing or self._num_tokens > _MAX_JOINED_TOKENS:
            self._outgoing.append(worker_pb2.ControllerMessage())
            self._num_tokens = num_tokens
            self._outgoing_wake.set()
        return self._outgoing[-1]

    def _acknowledge_later(self) -> None:
        """Acknowledgements are joined: one message for many steps."""
        if self.step_id - self._acked_step_id >= _ACK_STEPS:
            self._acknowledge()
        elif self._ack_timer is None:
            self._ack_timer = asyncio.get_running_loop().call_later(_ACK_INTERVAL_S, self._acknowledge)

    def _acknowledge(self) -> None:
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._acked_step_id = self.step_id
        if self.connected:
            self._message().ack.step_id = self.step_id

    def _disconnected(self) -> None:
        self.connected = False
        self._outgoing.clear()


def _describe(error: Exception) -> str:
    return f"{error.code().name}: {explain(error.details())}" if isinstance(error, grpc.aio.AioRpcError) else str(error)
