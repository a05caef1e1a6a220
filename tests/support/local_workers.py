"""Workers without Ray, for the controller's tests: the real server around a FakeEngine, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fake_engine import FakeEngine
from pilotfish.common.identity import Identity
from pilotfish.common.requests import WorkerInfo
from pilotfish.controller.authority import Authority
from pilotfish.controller.controller import Controller
from pilotfish.controller.service import InferenceService
from pilotfish.controller.worker_process import worker_name
from pilotfish.workers.server import WorkerServer
from pilotfish.workers.worker_service import ServerLimits


class LocalWorker:
    """A worker that can be killed as abruptly as a process: its connections break and nothing more comes from it."""

    def __init__(self, *, epoch: int, identity: Identity, limits: ServerLimits, engine_options: Mapping[str, Any]) -> None:
        self.server = WorkerServer(limits, identity)
        self.engine = FakeEngine(self.server.on_step, **engine_options)
        self.info: WorkerInfo = self.engine.info(epoch=epoch)
        self.address = self.server.start(self.engine, self.info, host="127.0.0.1")
        self.node = "here"
        self._dead = asyncio.Event()

    async def kill(self) -> None:
        await asyncio.to_thread(self.server.stop)
        await asyncio.to_thread(self.engine.stop)
        self._dead.set()

    async def wait_dead(self) -> str:
        await self._dead.wait()
        return "it was killed"

    async def end(self) -> None:
        if not self._dead.is_set():
            await self.kill()


@dataclass
class LocalLauncher:
    """Launches LocalWorkers. `failures` are raised by the next launches, in order; `living` are found as an earlier fleet's."""

    limits: ServerLimits = field(default_factory=lambda: ServerLimits(heartbeat_interval_s=0.05))
    engine_options: dict[str, Any] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)
    living: dict[str, LocalWorker] = field(default_factory=dict)
    launched: list[LocalWorker] = field(default_factory=list)
    authority: Authority = field(default_factory=Authority.create)

    async def launch(self, replica: str, *, epoch: int) -> LocalWorker:
        if self.failures:
            raise self.failures.pop(0)
        identity = self.authority.issue(worker_name(replica, epoch=epoch))
        worker = LocalWorker(epoch=epoch, identity=identity, limits=self.limits, engine_options=self.engine_options)
        self.launched.append(worker)
        return worker

    async def find(self) -> Mapping[str, LocalWorker]:
        return self.living


@dataclass
class Cluster:
    """A controller and the launcher of its workers."""

    controller: Controller
    launcher: LocalLauncher

    @property
    def service(self) -> InferenceService:
        return self.controller.service


StartCluster = Callable[..., Awaitable[Cluster]]
