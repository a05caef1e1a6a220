"""Gateways without processes: everything real, over real gRPC, on the test's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pilotfish.common.config import ServeConfig
from pilotfish.common.identity import Identity
from pilotfish.controller.gateway import Gateway
from pilotfish.controller.service import Addresses, InferenceService
from tcp_proxy import TcpProxy


@dataclass
class LocalGateway:
    """A GatewayProcess. `kill` breaks its clients' connections and the controller's."""

    gateway: Gateway
    addresses: Addresses
    controller_address: str
    proxy: TcpProxy  # between it and the controller
    _dead: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def service(self) -> InferenceService:
        return self.gateway.service

    async def kill(self) -> None:
        for task in self.gateway._tasks:
            task.cancel()
        assert self.gateway._doors._grpc is not None
        await self.gateway._doors._grpc._server.stop(0)
        await self.end()

    async def wait_dead(self) -> str:
        await self._dead.wait()
        return "it was killed"

    async def end(self) -> None:
        await self.gateway.stop()
        await self.proxy.stop()
        self._dead.set()


@dataclass
class LocalGatewayLauncher:
    """`living` are found as an earlier controller's; `launched` are all, the last ones last."""

    config: ServeConfig
    model_path: Path
    living: dict[str, LocalGateway] = field(default_factory=dict)
    launched: list[LocalGateway] = field(default_factory=list)

    async def launch(self, identity: Identity, *, controller_address: str) -> LocalGateway:
        proxy = TcpProxy(controller_address)
        gateway = Gateway(self.config, model_path=self.model_path, identity=identity, controller_address=await proxy.start())
        made = LocalGateway(gateway, await gateway.start(), controller_address, proxy)
        self.launched.append(made)
        return made

    async def find(self) -> Mapping[str, LocalGateway]:
        return self.living
