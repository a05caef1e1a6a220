"""A gateway process's one connection to the controller: messages up, ticks down, and a new connection after every break.

Life: `run` connects and, as long as there is use in it, connects again, also to a controller that was restarted at the same
address. What is sent while there is no connection is not kept: at each greeting the RemoteIntake says again what is in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from ..common.errors import Unavailable
from ..common.identity import CONTROLLER_NAME, Identity
from ..proto import gateway_pb2 as pb
from ..proto import gateway_pb2_grpc
from ..proto.credentials import channel_credentials, channel_options, explain

logger = logging.getLogger(__name__)

_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel connects at once, whatever an earlier one met
]
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5)
_BEAT_INTERVAL_S = 1.0
_CALL_TIMEOUT_S = 5.0
_WHY_TIMEOUT_S = 1.0
WAIT_S = 5.0  # of a new call, for a controller that is being restarted
_SILENCE_TIMEOUT_S = 4.0  # a tick comes every second
_FINAL = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED)


class GatewayUnfit(Exception):
    """There is no use in connecting again: the controller does not take this gateway."""


class LinkListener(Protocol):
    """Who receives what the link brings."""

    def on_connected(self) -> None:
        """What is sent now leaves now."""

    def on_disconnected(self) -> None: ...

    def take(self, tick: pb.ControllerTick) -> None: ...


class ControllerLink:
    """See the module's docstring. `hello` says who this is."""

    def __init__(self, *, address: str, identity: Identity) -> None:
        self._address = address
        self._identity = identity
        self._outgoing = pb.GatewayMessage()
        self._wake = asyncio.Event()
        self._connected = asyncio.Event()
        self._stub: gateway_pb2_grpc.GatewayLinkStub | None = None
        self._last_message_time = time.monotonic()

    @property
    def outgoing(self) -> pb.GatewayMessage:
        """The message that leaves next; `send` after adding to it."""
        return self._outgoing

    @property
    def is_connected(self) -> bool:
        return self._connected.is_set()

    @property
    def silent_s(self) -> float:
        """Since the last message came."""
        return time.monotonic() - self._last_message_time

    def send(self) -> None:
        self._wake.set()

    async def wait_connected(self, timeout_s: float) -> None:
        """Raises Unavailable: there was no controller for so long."""
        if self._connected.is_set():
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise Unavailable("the controller cannot be reached; it is probably being restarted", retry_after_s=1.0) from None

    async def call(self, method: str, request: Message) -> Any:
        """A call beside the stream. Raises Unavailable: there is no controller, or it did not answer."""
        await self.wait_connected(WAIT_S)
        try:
            return await getattr(self._stub, method)(request, timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"the controller did not answer: {explain(error.details())}", retry_after_s=1.0) from error

    async def run(self, hello: pb.GatewayHello, listener: LinkListener) -> None:
        """Stay connected until cancelled.

        Raises:
            GatewayUnfit: there is no use in trying again.
        """
        num_failures = 0
        while True:
            received_before = self._last_message_time
            try:
                await self._serve_one_connection(hello, listener)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
                if isinstance(error, grpc.aio.AioRpcError) and error.code() in _FINAL:
                    raise GatewayUnfit(explain(error.details())) from error
                if self.is_connected or not num_failures:
                    logger.warning("the connection to the controller at %s broke: %s", self._address, _describe(error))
            finally:
                self._connected.clear()
                self._stub = None
                self._outgoing = pb.GatewayMessage()
                listener.on_disconnected()
            num_failures = 0 if self._last_message_time > received_before else num_failures + 1
            await asyncio.sleep(_BACKOFF_S[min(num_failures, len(_BACKOFF_S) - 1)])

    async def _serve_one_connection(self, hello: pb.GatewayHello, listener: LinkListener) -> None:
        options = [*_OPTIONS, *channel_options(CONTROLLER_NAME)]
        async with grpc.aio.secure_channel(self._address, channel_credentials(self._identity), options=options) as channel:
            stub = gateway_pb2_grpc.GatewayLinkStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Connect()
            reading = asyncio.create_task(self._read(call, stub, listener))
            silence = asyncio.create_task(self._watch_silence())
            writing = asyncio.create_task(self._write(call, hello))
            try:
                await asyncio.wait((reading, silence, writing), return_when=asyncio.FIRST_COMPLETED)
                if writing.done():  # the call takes nothing any more; reading says why
                    await asyncio.wait((reading,), timeout=_WHY_TIMEOUT_S)
                for task in (reading, silence, writing):
                    if task.done():
                        task.result()
            finally:
                for task in (reading, silence, writing):
                    task.cancel()
                call.cancel()
                await asyncio.gather(reading, silence, writing, return_exceptions=True)

    async def _read(
        self, call: grpc.aio.StreamStreamCall, stub: gateway_pb2_grpc.GatewayLinkStub, listener: LinkListener
    ) -> None:
        """Until the controller or a failure ends the call. The first tick is its greeting."""
        while (tick := await call.read()) is not grpc.aio.EOF:
            self._last_message_time = time.monotonic()
            listener.take(tick)
            if not self._connected.is_set():
                self._stub = stub
                self._connected.set()
                listener.on_connected()

    async def _write(self, call: grpc.aio.StreamStreamCall, hello: pb.GatewayHello) -> None:
        """After the greeting one message for all that was added since the last one; an empty one after a while of nothing."""
        await call.write(pb.GatewayMessage(hello=hello))
        await self._connected.wait()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BEAT_INTERVAL_S):
                    await self._wake.wait()
            self._wake.clear()
            message, self._outgoing = self._outgoing, pb.GatewayMessage()
            await call.write(message)

    async def _watch_silence(self) -> None:
        """A connection that brings nothing is broken, whatever the transport thinks."""
        opened = time.monotonic()
        while time.monotonic() - max(opened, self._last_message_time) < _SILENCE_TIMEOUT_S:  # noqa: ASYNC110 - silence is no event
            await asyncio.sleep(_SILENCE_TIMEOUT_S / 4)
        raise TimeoutError(f"nothing came for {_SILENCE_TIMEOUT_S:g} s")


def _describe(error: Exception) -> str:
    return f"{error.code().name}: {explain(error.details())}" if isinstance(error, grpc.aio.AioRpcError) else str(error)
