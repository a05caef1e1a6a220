"""The standard health service (grpc.health.v1) of the gRPC door.

It needs no key, so nobody may do harm with it: requests have to arrive in time, the number of watchers is bounded, and one that
does not read delays nobody. (The servicer of grpcio-health-checking writes to a watcher while all changes of state wait.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2

from ..common.errors import InvalidRequest, Overloaded, PilotfishError
from .grpc_guard import Context, abort, first_message

MAX_WATCHERS = 256
_STATUS = health_pb2.HealthCheckResponse


class HealthService:
    """The server as a whole ("") and its `services` are serving, or not, together."""

    def __init__(self, services: Sequence[str], *, request_timeout_s: float) -> None:
        self._services = ("", *services)
        self._request_timeout_s = request_timeout_s
        self._is_serving = False
        self._is_closed = False
        self._watchers: set[asyncio.Event] = set()

    def set_serving(self, serving: bool) -> None:
        self._is_serving = serving
        for changed in self._watchers:
            changed.set()

    def close(self) -> None:
        """Not serving any more: watchers are told, and their calls end."""
        self._is_closed = True
        self.set_serving(False)

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {
            "Check": self._handler(health_pb2.HealthCheckRequest, self._check),
            "List": self._handler(health_pb2.HealthListRequest, self._list),
            "Watch": self._handler(health_pb2.HealthCheckRequest, self._watch),
        }
        return grpc.method_handlers_generic_handler(health.SERVICE_NAME, methods)

    def _handler(self, cls: type[Message], method: Callable[..., AsyncIterator[Message]]) -> grpc.RpcMethodHandler:
        async def handle(_messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Message]:
            try:
                request = cls.FromString(await first_message(context, timeout_s=self._request_timeout_s))
                async for answer in method(request, context):
                    yield answer
            except DecodeError:
                await abort(context, InvalidRequest(f"the request is not a valid {cls.DESCRIPTOR.name}"))
            except PilotfishError as error:
                await abort(context, error)

        return grpc.stream_stream_rpc_method_handler(handle, response_serializer=lambda message: message.SerializeToString())

    async def _check(self, request: health_pb2.HealthCheckRequest, context: Context) -> AsyncIterator[Message]:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of this name is here")
        yield self._status(request.service)

    async def _list(self, _request: health_pb2.HealthListRequest, _context: Context) -> AsyncIterator[Message]:
        yield health_pb2.HealthListResponse(statuses={name: self._status(name) for name in self._services})

    async def _watch(self, request: health_pb2.HealthCheckRequest, _context: Context) -> AsyncIterator[Message]:
        if len(self._watchers) >= MAX_WATCHERS:
            raise Overloaded(f"{MAX_WATCHERS} calls watch the health of this server already; use Check")
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            shown = None
            while True:
                changed.clear()
                if (status := self._status(request.service)) != shown:
                    shown = status
                    yield status
                if self._is_closed:
                    return
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in self._services:
            return _STATUS(status=_STATUS.SERVICE_UNKNOWN)
        return _STATUS(status=_STATUS.SERVING if self._is_serving else _STATUS.NOT_SERVING)
