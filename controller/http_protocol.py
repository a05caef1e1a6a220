"""HTTP/1.1 for clients that mean no good: uvicorn's protocol over h11, with limits.

A message that has begun must be complete in time, sent data must be taken in time, and where all places are in use, the
connection that has waited longest without a request gives way to a new one. What is no HTTP gets an error like any other.
"""

from __future__ import annotations

import asyncio
import http
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..common.config import GatewayConfig
from ..common.errors import InvalidRequest, PilotfishError, Unavailable
from .openai_response import error_json

_INCOMPLETE = (h11.IDLE, h11.SEND_BODY)  # in what its client has sent so far


def make_protocol(gateway: GatewayConfig) -> Callable[..., H11Protocol]:
    """For one server, whose connections share their places."""
    return partial(_Guarded, gateway=gateway, waiting={})


class _Guarded(H11Protocol):
    """`waiting` has the server's connections that owe a request or the rest of one, the oldest first."""

    def __init__(self, *arguments: Any, gateway: GatewayConfig, waiting: dict[_Guarded, None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waiting = waiting
        self.max_connections = gateway.max_connections
        self._timeout_s = gateway.client_timeout_s
        self._arrival_timer: asyncio.TimerHandle | None = None
        self._taking_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing then means: something waits to be taken
        if len(self.connections) > self.max_connections:
            if not self.waiting:
                self._refuse(503, Unavailable("all connections of this server are in use; try again in a moment"))
                return
            oldest = next(iter(self.waiting))
            del self.waiting[oldest]
            oldest.transport.abort()
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.waiting.pop(self, None)
        self._unset_keepalive_if_required()
        for timer in (self._arrival_timer, self._taking_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_arrival()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_arrival()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._taking_timer is None:
            self._taking_timer = self.loop.call_later(self._timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking_timer is not None:
            self._taking_timer.cancel()
            self._taking_timer = None

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls it where h11 has found no HTTP in what came; `msg` does not say what is wrong."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        problem = str(error or msg).partition(": bytearray(")[0]  # without what was sent
        self._refuse(status, InvalidRequest(f"this is no valid HTTP request: {problem}"))

    def _watch_arrival(self) -> None:
        """Until the message is complete that has begun, or that a new connection owes."""
        if self.conn.their_state in _INCOMPLETE and not self.transport.is_closing():
            self.waiting.setdefault(self)
            if self._arrival_timer is None:
                self._arrival_timer = self.loop.call_later(self._timeout_s, self._arrive_late)
            return
        self.waiting.pop(self, None)
        if self._arrival_timer is not None:
            self._arrival_timer.cancel()
            self._arrival_timer = None

    def _arrive_late(self) -> None:
        if self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # it has had an answer and asks for nothing more
            return
        self._refuse(408, InvalidRequest(f"the request was not complete after {self._timeout_s:g} s"))

    def _refuse(self, status: int, error: PilotfishError) -> None:
        """Answer, where no answer is under way, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_json(error)).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            reason = http.HTTPStatus(status).phrase
            for event in (
                h11.Response(status_code=status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
