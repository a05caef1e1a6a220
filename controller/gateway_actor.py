"""Gateway processes as Ray actors, on the controller's node: detached and named, so that a restarted controller finds them.

An actor's name is "<gateway>.<milliseconds of its start>": one that is being ended may still have its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..common import garbage, logs
from ..common.config import ServeConfig
from ..common.errors import PilotfishError
from ..common.identity import Identity
from . import grpc_wakeups
from .gateway import Gateway
from .gateway_fleet import GatewayDied
from .gateway_server import GATEWAY_PREFIX
from .ray_actors import cause_of_death, until_dead
from .service import Addresses

logger = logging.getLogger(__name__)

_DESCRIBE_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 8.0
_EXIT_CODE_UNFIT = 71


class GatewayActor:
    """Serves on the actor's own event loop from `start` until it is killed, or ends itself: the controller does not take it."""

    def __init__(self, name: str) -> None:
        logs.set_up(name)
        self._gateway: Gateway | None = None
        self._addresses: Addresses | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self, config: ServeConfig, model_path: str, identity: Identity, controller_address: str) -> Addresses:
        """Returns where the doors are.

        Raises:
            PilotfishError: why they cannot be opened.
        """
        grpc_wakeups.take_all_at_once(asyncio.get_running_loop())
        self._gateway = Gateway(config, model_path=model_path, identity=identity, controller_address=controller_address)
        self._addresses = await self._gateway.start()
        garbage.settle()
        self._watch = asyncio.create_task(self._end_when_unfit(self._gateway))
        return self._addresses

    async def describe(self) -> Addresses | None:
        """What `start` returned; None if it has not yet."""
        return self._addresses

    async def wait(self, timeout_s: float) -> None:
        """Returns after `timeout_s`; fails when the process ends before."""
        await asyncio.sleep(timeout_s)

    async def stop(self) -> None:
        """Close the doors; the caller ends this actor afterwards."""
        if self._watch is not None:
            self._watch.cancel()
        if self._gateway is not None:
            await self._gateway.stop()

    async def _end_when_unfit(self, gateway: Gateway) -> None:
        logger.critical("this gateway is of no use: %s", await gateway.wait_unfit())
        logging.shutdown()
        os._exit(_EXIT_CODE_UNFIT)


class RayGateway:
    """A GatewayProcess."""

    def __init__(self, handle: ActorHandle, addresses: Addresses) -> None:
        self._handle = handle
        self.addresses = addresses

    async def wait_dead(self) -> str:
        return await until_dead(self._handle)

    async def end(self) -> None:
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT_S):
                await self._handle.stop.remote()
        ray.kill(self._handle)


class RayGatewayLauncher:
    """A GatewayLauncher, in the namespace and on the node of the calling actor."""

    def __init__(self, config: ServeConfig, model_path: str) -> None:
        self._config = config
        self._model_path = model_path

    async def launch(self, identity: Identity, *, controller_address: str) -> RayGateway:
        """See `GatewayLauncher`."""
        log = self._config.log
        variables = grpc_wakeups.ray_environment() | logs.environment(log_level=log.log_level, log_format=log.log_format)
        handle = (
            ray.remote(GatewayActor)
            .options(
                name=f"{identity.name}.{int(time.time() * 1000)}",
                lifetime="detached",
                max_restarts=0,
                num_cpus=0,
                max_concurrency=1000,
                runtime_env={"env_vars": variables},
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
            )
            .remote(identity.name)
        )
        try:
            addresses = await handle.start.remote(self._config, self._model_path, identity, controller_address)
        except BaseException as error:
            ray.kill(handle)
            if isinstance(error, RayTaskError) and isinstance(error.cause, PilotfishError):
                raise error.cause from None
            if isinstance(error, RayActorError):
                raise GatewayDied(cause_of_death(error)) from error
            raise
        return RayGateway(handle, addresses)

    async def find(self) -> Mapping[str, RayGateway]:
        """See `GatewayLauncher`. Of several of one name the newest; others are ended."""
        found: dict[str, RayGateway] = {}
        for name in sorted(ray.util.list_named_actors(), reverse=True):
            gateway, _, start = name.partition(".")
            if not gateway.startswith(GATEWAY_PREFIX) or not start.isdecimal():
                continue
            with contextlib.suppress(ValueError):  # it ended meanwhile
                handle = ray.get_actor(name)
                addresses = None if gateway in found else await _describe(handle)
                if addresses is None:
                    ray.kill(handle)
                else:
                    found[gateway] = RayGateway(handle, addresses)
        return found


async def _describe(handle: ActorHandle) -> Addresses | None:
    try:
        async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
            addresses: Addresses | None = await handle.describe.remote()
    except (RayError, TimeoutError):
        return None
    return addresses
