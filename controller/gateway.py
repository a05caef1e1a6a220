"""A gateway process's content: front end, service and doors of its own, and the link to the controller.

Life: `start` opens the doors and connects, now or as soon as there is a controller; `stop` lets clients go, which may come back
to another gateway. `wait_unfit` returns when the controller does not take this gateway: its process is of no use then.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from .. import __version__
from ..common.config import ServeConfig
from ..common.identity import Identity
from ..proto import gateway_pb2 as pb
from .controller_link import ControllerLink, GatewayUnfit
from .doors import Doors
from .front_end import FrontEnd
from .remote_intake import RemoteIntake
from .service import Addresses, InferenceService

logger = logging.getLogger(__name__)


class Gateway:
    """See the module's docstring.

    Raises:
        ModelLoadError: the model's directory lacks a readable tokenizer, template or generation configuration.
    """

    def __init__(self, config: ServeConfig, *, model_path: str | Path, identity: Identity, controller_address: str) -> None:
        self._identity = identity
        self._front_end = FrontEnd(
            model_path, generation_config=config.model.generation_config, block_size=config.engine.block_size
        )
        self._link = ControllerLink(address=controller_address, identity=identity)
        self._intake = RemoteIntake(config, self._link, make_text=self._front_end.make_text)
        self.service = InferenceService(config=config, front_end=self._front_end, intake=self._intake)
        self._doors = Doors(self.service, self._front_end.tokenizer, config.gateway, render_metrics=self._intake.render_metrics)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> Addresses:
        """Returns where the doors are.

        Raises:
            ConfigError: a port is in use.
        """
        await self._doors.open()
        addresses = self.service.addresses
        hello = pb.GatewayHello(
            name=self._identity.name,
            version=__version__,
            grpc_address=addresses.grpc,
            http_address=addresses.http,
            pid=os.getpid(),
        )
        self._tasks = [
            asyncio.create_task(self._link.run(hello, self._intake)),
            asyncio.create_task(self._doors.follow_health(self._intake.changed, lambda: self._intake.is_serving)),
        ]
        return addresses

    async def wait_unfit(self) -> str:
        """Why the controller does not take it."""
        try:
            await self._tasks[0]
        except GatewayUnfit as error:
            return str(error)
        raise AssertionError("a link runs until its gateway is unfit or it is cancelled")

    async def stop(self) -> None:
        """May be called at any time, and again."""
        self._intake.close()
        await self._doors.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._front_end.close()
