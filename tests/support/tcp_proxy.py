"""A TCP connection that a test can break or make fall silent."""

from __future__ import annotations

import asyncio
import contextlib


class TcpProxy:
    """Forwards to `target` ("host:port"). `cut` breaks the open connections. While `silent` nothing passes, and what was sent
    comes after it, as over a link that loses every packet for a while. While `refuses`, new connections are broken at once."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._passes = asyncio.Event()
        self._passes.set()
        self.num_connections = 0
        self.refuses = False

    @property
    def silent(self) -> bool:
        return not self._passes.is_set()

    @silent.setter
    def silent(self, value: bool) -> None:
        if value:
            self._passes.clear()
        else:
            self._passes.set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def redirect(self, target: str) -> None:
        """Breaks the open connections; the next ones lead to `target`."""
        self._target = target
        self.cut()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        """Returns when all connections have ended. May be called again."""
        self._server.close()
        self.silent = False
        self.cut()
        if self._connections:
            await asyncio.wait(self._connections, timeout=10)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        self.num_connections += 1
        self._writers.add(writer)
        host, _, port = self._target.rpartition(":")
        try:
            if self.refuses:
                return
            with contextlib.suppress(OSError):
                to_reader, to_writer = await asyncio.open_connection(host, int(port))
                self._writers.add(to_writer)
                if writer.transport.is_closing():  # it was cut meanwhile
                    to_writer.transport.abort()
                await asyncio.gather(self._forward(reader, to_writer), self._forward(to_reader, writer))
                self._writers.discard(to_writer)
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._passes.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
