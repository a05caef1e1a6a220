"""Workers without Ray, for the controller's tests: the real server around a FakeEngine, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fake_engine import FakeEngine
from local_gateways import LocalGatewayLauncher
from pilotfish.common.config import ModelConfig
from pilotfish.common.identity import Identity
from pilotfish.common.requests import ServingWorker, WorkerInfo
from pilotfish.controller.authority import Authority
from pilotfish.controller.controller import Controller
from pilotfish.controller.service import InferenceService
from pilotfish.controller.worker_process import worker_name
from pilotfish.workers.server import WorkerServer
from pilotfish.workers.worker_service import ServerLimits


class LocalWorker:
    """A worker that can be killed as abruptly as a process: its connections break and nothing more comes from it.

    `server`, `engine`, `info` and `address` are those of its first data rank. It has as many as there are `identities`.
    """

    def __init__(
        self,
        *,
        epoch: int,
        identities: Sequence[Identity],
        limits: ServerLimits,
        engine_options: Mapping[str, Any],
        model: ModelConfig | None = None,
    ) -> None:
        self.servers = [WorkerServer(limits, identity) for identity in identities]
        self.engines = [FakeEngine(server.on_step, **engine_options) for server in self.servers]
        self.server, self.engine = self.servers[0], self.engines[0]
        self.info: WorkerInfo = self.engine.info(epoch=epoch)
        if model is not None:
            self.info = replace(self.info, model_path=model.model, model_version=model.model_version)
        addresses = [
            server.start(engine, self.info, host="127.0.0.1") for server, engine in zip(self.servers, self.engines, strict=True)
        ]
        self.address, self._others = addresses[0], addresses[1:]
        self.machine_is_lost = False
        self._dead = asyncio.Event()
        self.notice: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    @property
    def places(self) -> list[ServingWorker]:
        addresses = enumerate((self.address, *self._others))
        return [ServingWorker(address=address, node="here", info=self.info, rank=rank) for rank, address in addresses]

    async def kill(self) -> None:
        for server, engine in zip(self.servers, self.engines, strict=True):
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(engine.stop)
        self._dead.set()

    async def wait_dead(self) -> str:
        await self._dead.wait()
        return "it was killed"

    async def wait_notice(self) -> float:
        return await asyncio.shield(self.notice)

    async def has_lost_machine(self) -> bool:
        return self.machine_is_lost

    async def end(self) -> None:
        if not self._dead.is_set():
            await self.kill()


@dataclass
class LocalLauncher:
    """Launches LocalWorkers. `failures` are raised by the next launches, in order; `living` are found as an earlier fleet's.
    `options_of_version` are engines' of one version of the model."""

    limits: ServerLimits = field(default_factory=lambda: ServerLimits(heartbeat_interval_s=0.05))
    engine_options: dict[str, Any] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)
    living: dict[str, LocalWorker] = field(default_factory=dict)
    launched: list[LocalWorker] = field(default_factory=list)
    authority: Authority = field(default_factory=Authority.create)
    num_data_ranks: int = 1
    options_of_version: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def launch(self, replica: str, *, epoch: int, model: ModelConfig, **_: Any) -> LocalWorker:
        if self.failures:
            raise self.failures.pop(0)
        names = [worker_name(replica, epoch=epoch, rank=rank) for rank in range(self.num_data_ranks)]
        worker = LocalWorker(
            epoch=epoch,
            identities=list(map(self.authority.issue, names)),
            limits=self.limits,
            engine_options=self.engine_options | self.options_of_version.get(model.model_version, {}),
            model=model,
        )
        self.launched.append(worker)
        return worker

    async def find(self) -> Mapping[str, LocalWorker]:
        return self.living


@dataclass
class Cluster:
    """A controller, the launcher of its workers, and that of its gateways, where it has any."""

    controller: Controller
    launcher: LocalLauncher
    gateways: LocalGatewayLauncher | None = None

    @property
    def service(self) -> InferenceService:
        """Behind the doors: of the first gateway, or the controller's own."""
        return self.controller.service if self.gateways is None else self.gateways.launched[0].service


StartCluster = Callable[..., Awaitable[Cluster]]
