"""The controller's gRPC server for gateway processes: their connections, and what they ask between two messages.

Only parts of this cluster get in (mTLS), and only those whose certificate says that they are a gateway. Life: `start`; `flush`
when the last was said; `stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import grpc

from .. import __version__
from ..common.cluster_state import ClusterState, GatewayStatus
from ..common.errors import ConfigError
from ..common.identity import Identity
from ..proto import gateway_pb2 as pb
from ..proto import gateway_pb2_grpc
from ..proto import inference_pb2 as inference
from ..proto.credentials import peer_name, server_credentials
from ..proto.routing_codec import decision_to_proto
from .gateway_connection import GatewayConnection
from .intake import Intake
from .metrics import Metrics

logger = logging.getLogger(__name__)

GATEWAY_PREFIX = "gateway-"
_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),  # all that a gateway has in flight, after a break
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]
_SHOW_INTERVAL_S = 1.0
_FLUSH_TIMEOUT_S = 2.0
_HELLO_TIMEOUT_S = 10.0

Context: TypeAlias = grpc.aio.ServicerContext


class GatewayServer(gateway_pb2_grpc.GatewayLinkServicer):
    """See the module's docstring. `status` gives the cluster as it is now."""

    def __init__(self, intake: Intake, metrics: Metrics, *, identity: Identity, status: Callable[[], ClusterState]) -> None:
        self._intake = intake
        self._metrics = metrics
        self._identity = identity
        self._status = status
        self._connections: dict[str, GatewayConnection] = {}
        self._server: grpc.aio.Server | None = None
        self._show_task: asyncio.Task[None] | None = None

    async def start(self, address: str) -> str:
        """Listen at "host:port"; returns the address.

        Raises:
            ConfigError: the port is in use.
        """
        server = grpc.aio.server(options=_OPTIONS)
        gateway_pb2_grpc.add_GatewayLinkServicer_to_server(self, server)
        try:
            port = server.add_secure_port(address, server_credentials(self._identity))
        except RuntimeError as error:
            raise ConfigError(f"the controller cannot listen for gateways on {address}: {error}") from error
        await server.start()
        self._server = server
        self._show_task = asyncio.create_task(self._show())
        return f"{address.rpartition(':')[0]}:{port}"

    async def flush(self) -> None:
        """Until the gateways were told what there is to say, a moment at most."""
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                while not all(connection.is_flushed for connection in self._connections.values()):  # noqa: ASYNC110 - once
                    await asyncio.sleep(0.01)
        except TimeoutError:
            logger.warning("a gateway did not take the last messages")

    async def stop(self) -> None:
        if self._show_task is not None:
            self._show_task.cancel()
        if self._server is not None:
            await self._server.stop(0.2)

    def connection(self, name: str) -> GatewayConnection | None:
        """Of the gateway of that name, while it has one."""
        return self._connections.get(name)

    def statuses(self) -> tuple[GatewayStatus, ...]:
        """Of those that are connected."""
        return tuple(
            GatewayStatus(
                name=name,
                is_connected=True,
                grpc_address=connection.hello.grpc_address,
                http_address=connection.hello.http_address,
                pid=connection.hello.pid,
                num_streams=connection.num_streams,
            )
            for name, connection in sorted(self._connections.items())
        )

    async def Connect(self, _requests: AsyncIterator[pb.GatewayMessage], context: Context) -> None:
        await _check_caller(context)
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                first = await context.read()
        except TimeoutError:
            first = grpc.aio.EOF
        if first is grpc.aio.EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello")
        hello = first.hello
        await self._check(hello, context)
        connection = GatewayConnection(hello, self._intake)
        if (earlier := self._connections.pop(hello.name, None)) is not None:
            earlier.close()
        self._connections[hello.name] = connection
        logger.info("%s is connected, with doors at %s and %s", hello.name, hello.grpc_address, hello.http_address)
        connection.show(self._status())
        writing = asyncio.create_task(self._write(connection, context))
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                await connection.take(message)
        finally:
            writing.cancel()
            connection.close()
            if self._connections.get(hello.name) is connection:
                del self._connections[hello.name]
                logger.warning("%s is not connected any more", hello.name)

    async def Abort(self, request: pb.GatewayAbortRequest, context: Context) -> inference.AbortResponse:
        await _check_caller(context)
        tenant = self._intake.tenants.named(request.tenant)
        return inference.AbortResponse(found=await self._intake.abort(request.request_id, tenant=tenant))

    async def ExplainRoute(self, request: inference.ExplainRouteRequest, context: Context) -> inference.ExplainRouteResponse:
        await _check_caller(context)
        decisions = await self._intake.explain_route(request.request_id)
        return inference.ExplainRouteResponse(decisions=map(decision_to_proto, decisions))

    async def Metrics(self, _request: pb.MetricsRequest, context: Context) -> pb.MetricsResponse:
        await _check_caller(context)
        content, media_type = self._metrics.render(self._status())
        return pb.MetricsResponse(content=content, media_type=media_type)

    async def _check(self, hello: pb.GatewayHello, context: Context) -> None:
        if hello.name != peer_name(context):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"the certificate is not that of a gateway {hello.name!r}")
        if hello.version != __version__:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"the controller is pilotfish {__version__}, the gateway {hello.version}"
            )

    async def _write(self, connection: GatewayConnection, context: Context) -> None:
        while True:
            await context.write(await connection.next_tick())

    async def _show(self) -> None:
        """Every gateway shows the cluster at its doors: it is told at every change, and every second."""
        while True:
            self._intake.changed.clear()
            if self._connections:
                state = self._status()
                for connection in self._connections.values():
                    connection.show(state)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SHOW_INTERVAL_S):
                    await self._intake.changed.wait()


async def _check_caller(context: Context) -> None:
    """A worker's certificate is of the same authority."""
    if not (name := peer_name(context)).startswith(GATEWAY_PREFIX):
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"only gateways may call the controller here, not {name!r}")
