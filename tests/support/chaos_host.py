"""A small cluster of real processes to be hurt: a controller with its journal on disk, its workers, and proxies on every link.

It runs in the test's own process and is what Ray is to a real cluster: it starts workers when the controller asks, finds them
for its successor, and knows when one has died. Links to workers and the doors of clients lead through TcpProxies.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from chaos_processes import Settings, framed, receive
from pilotfish.common.identity import Identity
from pilotfish.common.requests import ServingWorker
from pilotfish.controller.authority import Authority
from pilotfish.controller.service import Addresses
from pilotfish.controller.worker_process import WorkerDied
from tcp_proxy import TcpProxy
from zygote import Child, Zygote

PRELOADED = ("chaos_processes", "pilotfish.workers.model_runner")
_START_S = 240.0


@dataclass(eq=False)
class Worker:
    """A worker's process and the proxy before its server; `serving` is None while it starts."""

    number: int
    replica: str
    epoch: int
    process: Child
    ready: asyncio.Event
    serving: ServingWorker | None = None
    link: TcpProxy | None = None

    @property
    def lives(self) -> bool:
        return not self.process.has_ended


class ChaosHost:
    """See the module. `doors` are addresses for clients, each with a connection to the controller of its own."""

    def __init__(self, settings: Settings, directory: Path, *, zygote: Zygote, num_doors: int) -> None:
        """`zygote` has imported PRELOADED."""
        self._settings = settings
        self._zygote = zygote
        self._directory = directory
        self._path = str(directory / "host")
        self._authority = Authority.create()
        self._doors = [TcpProxy("127.0.0.1:1") for _ in range(num_doors)]
        self._workers: list[Worker] = []
        self._numbers = iter(range(10**9))
        self._opened = asyncio.Event()
        self._controller_number = -1
        self.controller: Child | None = None
        self.addresses = Addresses()
        self.doors: list[str] = []
        self.http_door = ""

    async def __aenter__(self) -> ChaosHost:
        self._server = await asyncio.start_unix_server(self._answer, self._path)
        self.doors = [await door.start() for door in self._doors]
        self._http = TcpProxy("127.0.0.1:1")
        self.http_door = await self._http.start()
        await self.start_controller()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in [self.controller, *(worker.process for worker in self._workers)]:
            if child is not None:
                child.end()
        for proxy in [*self._doors, self._http, *(worker.link for worker in self._workers)]:
            if proxy is not None:
                await proxy.stop()
        self._server.close()

    @property
    def serving(self) -> list[Worker]:
        """Workers that live and serve, oldest first."""
        return [worker for worker in self._workers if worker.serving is not None and worker.lives]

    @property
    def num_launched(self) -> int:
        """Workers, dead or alive."""
        return len(self._workers)

    async def start_controller(self) -> None:
        """Returns when its doors are open; its predecessor has been killed."""
        self._opened.clear()
        self._controller_number = next(self._numbers)
        self.controller = self._zygote.fork(
            "chaos_processes:run_controller",
            self._settings,
            self._path,
            self._controller_number,
            self._authority,
            self._directory / "journal.sqlite",
            log=self._directory / "controller.log",
        )
        async with asyncio.timeout(_START_S):
            await self._opened.wait()
        for door in self._doors:
            door.redirect(self.addresses.grpc)
        self._http.redirect(self.addresses.http)

    async def restart_controller(self) -> None:
        assert self.controller is not None
        self.controller.end()
        for door in [*self._doors, self._http]:
            door.cut()  # as the end of the process breaks them
        await self.start_controller()

    def break_client(self, number: int) -> None:
        self._doors[number].cut()

    async def wait_serving(self, num_replicas: int) -> None:
        async with asyncio.timeout(_START_S):
            while len(self.serving) < num_replicas:
                await asyncio.sleep(0.02)

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._directory.glob("*.log")))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One call (see chaos_processes.ask)."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            kind, *arguments = await receive(reader)
            work = asyncio.create_task(self._calls()[kind](*arguments))
            gone = asyncio.create_task(reader.read())
            try:
                await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    writer.write(framed(work.result()))
                    await writer.drain()
            finally:
                work.cancel()
                gone.cancel()
        writer.close()

    def _calls(self) -> dict[str, Callable[..., Any]]:
        return {
            "serving": self._note_serving,
            "open": self._note_open,
            "launch": self._launch,
            "find": self._find,
            "wait_dead": self._wait_dead,
            "end": self._end,
        }

    async def _note_serving(self, number: int, serving: ServingWorker) -> None:
        worker = self._worker(number)
        link = TcpProxy(serving.address)
        worker.serving = replace(serving, address=await link.start())
        worker.link = link
        worker.ready.set()

    async def _note_open(self, number: int, addresses: Addresses) -> None:
        if number == self._controller_number:
            self.addresses = addresses
            self._opened.set()

    async def _launch(self, replica: str, identity: Identity, epoch: int) -> tuple[int, list[ServingWorker]] | WorkerDied:
        number = next(self._numbers)
        process = self._zygote.fork(
            "chaos_processes:run_worker",
            self._settings,
            self._path,
            number,
            identity,
            epoch,
            log=self._directory / "workers.log",
        )
        worker = Worker(number, replica, epoch, process, asyncio.Event())
        self._workers.append(worker)
        died = asyncio.create_task(process.wait())
        ready = asyncio.create_task(worker.ready.wait())
        try:
            await asyncio.wait([died, ready], return_when=asyncio.FIRST_COMPLETED)
        finally:
            died.cancel()
            ready.cancel()
            if worker.serving is None:  # nobody waits for it any more, or it has died
                process.kill()
        return (number, [worker.serving]) if worker.serving else WorkerDied("its process ended while it started")

    async def _find(self) -> dict[str, tuple[int, list[ServingWorker]]]:
        newest = {worker.replica: worker for worker in sorted(self.serving, key=lambda worker: worker.epoch)}
        for worker in self.serving:
            if newest[worker.replica] is not worker:
                worker.process.kill()
        return {name: (worker.number, [worker.serving]) for name, worker in newest.items() if worker.serving}

    async def _wait_dead(self, number: int) -> str:
        await self._worker(number).process.wait()
        return "its process has ended"

    async def _end(self, number: int) -> None:
        worker = self._worker(number)
        worker.process.kill()
        await worker.process.wait()
        if worker.link is not None:
            await worker.link.stop()

    def _worker(self, number: int) -> Worker:
        return next(worker for worker in self._workers if worker.number == number)
