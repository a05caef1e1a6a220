"""How clients come in: through doors in the controller's process, or through gateway processes (`gateway.num_gateways`).

Both are used the same way: `open`, which may be tried again after a ConfigError; `wait_open`; `close`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..common.cluster_state import ClusterState
from ..common.config import ServeConfig
from ..common.identity import CONTROLLER_NAME
from .authority import Authority
from .choice_text import MakeText, tokens_only
from .doors import Doors
from .front_end import FrontEnd
from .gateway_fleet import GatewayFleet, GatewayLauncher
from .gateway_server import GatewayServer
from .intake import Intake
from .metrics import Metrics
from .service import Addresses, InferenceService

_LINK_HOST = "127.0.0.1"


class Entrance(Protocol):
    """See the module's docstring. `make_text` is for choices of an earlier controller's requests."""

    make_text: MakeText

    async def open(self) -> None:
        """Raises ConfigError: a port is in use."""

    async def wait_open(self) -> Addresses:
        """Where clients come in. Raises PilotfishError: why a gateway cannot start."""

    def status(self) -> ClusterState: ...

    async def close(self) -> None:
        """All requests have ended. May be called at any time."""


class OwnDoors:
    """An Entrance.

    Raises:
        ModelLoadError: the model's directory lacks a readable tokenizer, template or generation configuration.
    """

    def __init__(self, config: ServeConfig, intake: Intake, metrics: Metrics, *, model_path: str | Path) -> None:
        self.front_end = FrontEnd(
            model_path, generation_config=config.model.generation_config, block_size=config.engine.block_size
        )
        self.make_text = self.front_end.make_text
        self.service = InferenceService(config=config, front_end=self.front_end, intake=intake)
        self.doors = Doors(self.service, self.front_end.tokenizer, config.gateway, render_metrics=self._render_metrics)
        self._intake = intake
        self._metrics = metrics
        self._watch: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """See `Entrance`."""
        await self.doors.open()

    async def wait_open(self) -> Addresses:
        """See `Entrance`."""
        self._watch = asyncio.create_task(self.doors.follow_health(self._intake.changed, lambda: self._intake.is_serving))
        return self.service.addresses

    def status(self) -> ClusterState:
        return self.service.status()

    async def close(self) -> None:
        """See `Entrance`."""
        if self._watch is not None:
            self._watch.cancel()
        await self.doors.close()
        self.front_end.close()

    async def _render_metrics(self) -> tuple[bytes, str]:
        return self._metrics.render(self.status())


class GatewayProcesses:
    """An Entrance; they run on the controller's machine."""

    make_text = staticmethod(tokens_only)

    def __init__(
        self, config: ServeConfig, intake: Intake, metrics: Metrics, *, launcher: GatewayLauncher, authority: Authority
    ) -> None:
        self._port = config.gateway.link_port
        self._intake = intake
        identity = authority.issue(CONTROLLER_NAME)
        self.server = GatewayServer(intake, metrics, identity=identity, status=self.status)
        self._fleet = GatewayFleet(
            config.gateway.num_gateways,
            launcher=launcher,
            server=self.server,
            authority=authority,
        )

    async def open(self) -> None:
        """See `Entrance`. Returns when gateways of an earlier controller have said what they have in flight."""
        await self._fleet.start(await self.server.start(f"{_LINK_HOST}:{self._port}"))

    async def wait_open(self) -> Addresses:
        """See `Entrance`."""
        return await self._fleet.wait_ready()

    def status(self) -> ClusterState:
        gateways = self._fleet.statuses()
        first = gateways[0]
        return replace(
            self._intake.status(), gateways=gateways, grpc_address=first.grpc_address, http_address=first.http_address
        )

    async def close(self) -> None:
        """See `Entrance`. Gateways say the last words to their clients first."""
        await self.server.flush()
        await self._fleet.stop()
        await self.server.stop()
