"""The cheapest gRPC client there is: HTTP/2 frames by hand, no header is decoded and no message parsed.

For benchmarks of a server that shares the machine with its clients: a message costs this client a few microseconds, grpc.aio's
about fifty. One call is one request message and a stream of answers. It trusts the server and is no example of a client.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_MAX_WINDOW = 2**31 - 1


@dataclass(slots=True, eq=False)
class Call:
    """What has come of a call. `messages` are (monotonic seconds, bytes); `on_end` is called once, also if it broke."""

    on_end: Callable[[Call], None]
    messages: list[tuple[float, bytes]] = field(default_factory=list)
    rest: bytes = b""


class RawConnection(asyncio.Protocol):
    """One connection to one method: `await RawConnection.open(...)`, then `begin` calls."""

    def __init__(self, host: str, path: str, *, timeout_s: int) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._stream_ids = itertools.count(1, 2)
        self._calls: dict[int, Call] = {}
        self._headers = _header_block(host, path, timeout_s)

    @classmethod
    async def open(cls, address: str, path: str, *, timeout_s: int = 600) -> RawConnection:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: cls(address, path, timeout_s=timeout_s), host, int(port)))[1]

    def begin(self, message: bytes, on_end: Callable[[Call], None]) -> Call:
        call = Call(on_end)
        stream_id = next(self._stream_ids)
        self._calls[stream_id] = call
        prefixed = struct.pack(">BI", 0, len(message)) + message
        assert self._transport is not None
        self._transport.write(
            _frame(_HEADERS, _END_HEADERS, stream_id, self._headers) + _frame(_DATA, _END_STREAM, stream_id, prefixed)
        )
        return call

    def close(self) -> None:
        """Ends all calls; nobody is told."""
        self._calls.clear()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = struct.pack(">HIHI", 2, 0, 4, _MAX_WINDOW)  # no push, and room for all that may come on a stream
        window = struct.pack(">I", _MAX_WINDOW - 65_535)
        transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, window))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        for stream_id in list(self._calls):
            self._end(stream_id)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        data = self._received + data
        start, length = 0, len(data)
        while length - start >= 9:
            size = int.from_bytes(data[start : start + 3], "big")
            end = start + 9 + size
            if end > length:
                break
            kind, flags = data[start + 3], data[start + 4]
            self._take_frame(kind, flags, int.from_bytes(data[start + 5 : start + 9], "big"), data[start + 9 : end], now_s)
            start = end
        self._received = data[start:]

    def _take_frame(self, kind: int, flags: int, stream_id: int, payload: bytes, now_s: float) -> None:
        if kind == _DATA and (call := self._calls.get(stream_id)) is not None:
            data, start = call.rest + payload, 0
            while len(data) - start >= 5:
                end = start + 5 + int.from_bytes(data[start + 1 : start + 5], "big")
                if end > len(data):
                    break
                call.messages.append((now_s, data[start + 5 : end]))
                start = end
            call.rest = data[start:]
        elif kind == _SETTINGS and not flags & _ACK:
            self._send(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._send(_frame(_PING, _ACK, 0, payload))
        elif kind == _GOAWAY:
            raise ConnectionError(f"the server ends the connection: {payload[8:]!r}")
        if kind == _RST_STREAM or (kind in {_DATA, _HEADERS} and flags & _END_STREAM):
            self._end(stream_id)

    def _end(self, stream_id: int) -> None:
        if (call := self._calls.pop(stream_id, None)) is not None:
            call.on_end(call)

    def _send(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream_id) + payload


def _header_block(host: str, path: str, timeout_s: int) -> bytes:
    """HPACK without a dynamic table: indexed names of the static table, literal values, no Huffman code."""

    def text(value: str) -> bytes:
        assert len(value) < 127
        return bytes((len(value),)) + value.encode()

    named = {"te": "trailers", "content-type": "application/grpc", "grpc-timeout": f"{timeout_s}S", "user-agent": "raw"}
    return (
        b"\x83\x86\x04"  # POST, http, a path
        + text(path)
        + b"\x01"  # an authority
        + text(host)
        + b"".join(b"\x00" + text(name) + text(value) for name, value in named.items())
    )
