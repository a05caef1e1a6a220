"""The socket of the HTTP door."""

from __future__ import annotations

import asyncio
import socket

import pytest
from pilotfish.controller.http_server import bind


@pytest.mark.parametrize("shared", [False, True])
async def test_what_is_small_leaves_at_once(shared: bool) -> None:
    """Else the second write of an answer waits for its reader's acknowledgement of the first: 40 ms on a kept connection."""
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listener = bind("127.0.0.1", 0, shared=shared)
    server = await asyncio.start_server(note, sock=listener)
    async with server:
        _, writer = await asyncio.open_connection(*listener.getsockname())
        async with asyncio.timeout(10):
            assert await accepted
        writer.close()
