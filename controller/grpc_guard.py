"""What stands before every call of the gRPC door: limits on the connection, the key, and how an error ends a call.

A client that sends nothing, half a request, or nothing more, holds a connection or a call for a limited time only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NoReturn, TypeAlias

import grpc
from grpc_health.v1 import health

from ..common.config import GatewayConfig
from ..common.errors import DeadlineExceeded, InternalError, InvalidRequest, PilotfishError, clipped, status_row
from .tenants import Tenants

logger = logging.getLogger(__name__)

MAX_CALLS = 16_384
_IDLE_MS = 10 * 60 * 1000  # a connection without calls; clients open another when they need one
_HEALTH_METHODS = f"/{health.SERVICE_NAME}/"

Context: TypeAlias = grpc.aio.ServicerContext


def server_options(config: GatewayConfig) -> list[tuple[str, int]]:
    timeout_ms = int(config.client_timeout_s * 1000)
    return [
        ("grpc.so_reuseport", int(config.num_gateways > 1)),
        ("grpc.max_receive_message_length", config.max_body_bytes),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        ("grpc.server_handshake_timeout_ms", timeout_ms),
        ("grpc.http2.settings_timeout", timeout_ms),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]


class KeyGuard(grpc.aio.ServerInterceptor):
    """Lets no call pass without a key but those of the health service: nor one of a service that was added and forgotten."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        if not handler_call_details.method.startswith(_HEALTH_METHODS):
            metadata = dict(handler_call_details.invocation_metadata or ())
            try:
                self._tenants.authenticate(metadata.get("authorization"))
            except PilotfishError as error:
                return _refusal(error)
        return await continuation(handler_call_details)


async def first_message(context: Context, *, timeout_s: float) -> bytes:
    """The request of a call.

    Raises:
        InvalidRequest: it did not come, or not in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            message = await context.read()
    except TimeoutError:
        raise InvalidRequest(f"the request did not arrive within {timeout_s:g} s of its call") from None
    if message is grpc.aio.EOF:
        raise InvalidRequest("the call ended before its request was sent")
    return message


def cut_off_later(context: Context, delay_s: float) -> asyncio.TimerHandle:
    """End the call of the current task after so long, whatever it waits for: a client that does not take its answer, say."""
    task = asyncio.current_task()
    assert task is not None
    endings: set[asyncio.Task[None]] = set()  # asyncio itself keeps tasks weakly

    async def end() -> None:
        with contextlib.suppress(grpc.aio.AbortError):
            await abort(context, DeadlineExceeded("the answer was not taken in time"))

    def cut() -> None:
        endings.add(asyncio.ensure_future(end()))  # it waits for the client, but with nothing of the request
        task.cancel()

    return asyncio.get_running_loop().call_later(delay_s, cut)


async def abort(context: Context, error: Exception) -> NoReturn:
    """End the call with the error's status, its code and retry-after in trailing metadata."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, PilotfishError):
        logger.exception("a gRPC call failed", exc_info=error)
        error = InternalError(f"pilotfish failed ({type(error).__name__}); the controller's log has the details")
    metadata = [("pilotfish-error-code", error.code)]
    if error.retry_after_s is not None:
        metadata.append(("pilotfish-retry-after-ms", str(math.ceil(error.retry_after_s * 1000))))
    status = getattr(grpc.StatusCode, status_row(error).grpc)
    await context.abort(status, clipped(error.message), trailing_metadata=tuple(metadata))
    raise AssertionError("context.abort raises")


def _refusal(error: PilotfishError) -> grpc.RpcMethodHandler:
    async def refuse(_messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        await abort(context, error)
        yield b""

    return grpc.stream_stream_rpc_method_handler(refuse)
