"""The cheapest HTTP client there is for streams of an OpenAI-style server: bytes are kept as they come, no header is read.

For benchmarks of a server that shares the machine with its clients. A connection carries one stream at a time and is kept for
the next. It trusts the server and is no example of a client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_END_OF_STREAM = b"data: [DONE]\n\n\r\n0\r\n\r\n"
_EVENT = b"data: {"


class RawStream(asyncio.Protocol):
    """`await RawStream.open(...)`, then `begin` a call, and again from its `on_end`, which also a broken connection calls.

    Attributes:
        parts: of the call in progress, (monotonic seconds, bytes).
    """

    def __init__(self, head: bytes) -> None:
        self._head = head
        self._transport: asyncio.Transport | None = None
        self._on_end: Callable[[RawStream], None] | None = None
        self.parts: list[tuple[float, bytes]] = []

    @classmethod
    async def open(cls, address: str, path: str) -> RawStream:
        host, _, port = address.rpartition(":")
        head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: ".encode()
        return (await asyncio.get_running_loop().create_connection(lambda: cls(head), host, int(port)))[1]

    def begin(self, body: bytes, on_end: Callable[[RawStream], None]) -> None:
        self.parts, self._on_end = [], on_end
        assert self._transport is not None
        self._transport.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))

    @property
    def num_events(self) -> int:
        """Of the call in progress: messages with text, and those of errors."""
        return sum(data.count(_EVENT) for _, data in self.parts)

    def close(self) -> None:
        """Ends the call; nobody is told."""
        self._on_end = None
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.parts.append((time.monotonic(), data))
        if data.endswith(b"0\r\n\r\n") and b"".join(part for _, part in self.parts[-3:]).endswith(_END_OF_STREAM):
            self._end()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(self)
