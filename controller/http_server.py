"""What every HTTP route needs: a server, bodies with a bound, a stream that ends with its reader."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..common.config import GatewayConfig
from ..common.errors import (
    Cancelled,
    InvalidRequest,
    PilotfishError,
    RequestTooLarge,
    Unauthenticated,
    status_row,
)
from .http_protocol import make_protocol
from .openai_response import error_json

T = TypeVar("T")


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process belongs to the controller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(app: ASGIApp, gateway: GatewayConfig) -> Server:
    return Server(
        uvicorn.Config(
            _unambiguous(app),
            http=make_protocol(gateway),  # type: ignore[arg-type]  # called like a class
            log_level="error",  # what clients do wrong is told to them
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
    )


def _unambiguous(app: ASGIApp) -> ASGIApp:
    """Refuses what a proxy before this server may read as two requests where it is one (RFC 9112, 6.1)."""

    async def check(scope: Scope, receive: Receive, send: Send) -> None:
        names = [name for name, _ in scope["headers"]]
        if b"transfer-encoding" in names and b"content-length" in names:
            error = InvalidRequest("a request has either Content-Length or Transfer-Encoding, not both")
            await error_response(error, close=True)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return check


async def read_body(request: Request, gateway: GatewayConfig) -> bytes:
    """The body.

    Raises:
        RequestTooLarge: it is longer than max_body_bytes; the rest is not read.
        Cancelled: the connection closed before its end.
    """
    body, max_bytes = bytearray(), gateway.max_body_bytes
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect:
        raise Cancelled("the connection closed before the end of the body") from None
    return bytes(body)


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is over {max_bytes} bytes; send less, or start the server with a larger --max-body-bytes")


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), status_code=status, media_type="application/json", headers=headers)


def error_response(error: PilotfishError, *, close: bool = False) -> Response:
    """The error's status and OpenAI-style body, with Retry-After in whole seconds where it is known."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if close or isinstance(error, RequestTooLarge):
        headers["Connection"] = "close"  # the rest of the body was not read
    return json_response(error_json(error), status=status_row(error).http, headers=headers)


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def unless_disconnected(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """The result of `work()`, which is cancelled when the reader closes its connection.

    Raises:
        Cancelled: the reader has gone; nobody will see an answer.
    """
    task = asyncio.ensure_future(work())
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client closed its connection")
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from an iterator of data lines, closed as soon as the reader has gone."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._lines = lines

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def send_all() -> None:
            async for line in self._lines:
                await send({"type": "http.response.body", "body": f"data: {line}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        with contextlib.suppress(Cancelled):
            await unless_disconnected(receive, send_all)
