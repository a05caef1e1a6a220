"""Worker processes as Ray actors: detached and named, so that a restarted controller finds them again.

An actor's name is "<replica>.<epoch>", in the cluster's namespace. The actor class is handed in: the controller does not
know workers/.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from ..common.config import ServeConfig
from ..common.errors import ConfigError, PilotfishError
from ..common.requests import ServingWorker, WorkerInfo
from .worker_process import WorkerDied

logger = logging.getLogger(__name__)

_NUM_THREADS = 4
_WAIT_S = 30.0
_UNAVAILABLE_PAUSE_S = 0.2
_DESCRIBE_TIMEOUT_S = 5.0
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # the kernels have threads of their own, which OpenMP's idle ones would slow down


class RayWorker:
    """A WorkerProcess in a Ray actor."""

    def __init__(self, handle: ActorHandle, serving: ServingWorker) -> None:
        self._handle = handle
        self.address: str = serving.address
        self.node: str = serving.node
        self.info: WorkerInfo = serving.info

    async def wait_dead(self) -> str:
        while True:
            try:
                await self._handle.wait.remote(_WAIT_S)
            except ActorUnavailableError:  # Ray does not know yet
                await asyncio.sleep(_UNAVAILABLE_PAUSE_S)
            except RayActorError as error:
                return _cause_of_death(error)

    async def end(self) -> None:
        ray.kill(self._handle)


class RayLauncher:
    """Starts workers in the namespace of the calling actor."""

    def __init__(self, worker_class: ActorClass, config: ServeConfig) -> None:
        self._worker_class = worker_class
        self._config = config
        self._node = ray.get_runtime_context().get_node_id()

    async def launch(self, replica: str, *, epoch: int) -> RayWorker:
        """See `Launcher`."""
        device = self._device()
        handle = self._worker_class.options(
            name=f"{replica}.{epoch}",
            lifetime="detached",
            max_restarts=0,
            max_concurrency=_NUM_THREADS,
            num_cpus=0,
            num_gpus=1 if device == "cuda" else 0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": _ENVIRONMENT},
        ).remote(replica)
        try:
            serving = await handle.start.remote(
                model_config=self._config.model,
                engine_config=replace(self._config.engine, device=device),
                epoch=epoch,
                controller_node=self._node,
                num_node_workers=self._num_node_workers(),
            )
        except BaseException as error:
            ray.kill(handle)
            if isinstance(error, RayTaskError) and isinstance(error.cause, PilotfishError):
                raise error.cause from None
            if isinstance(error, RayError):
                raise WorkerDied(_cause_of_death(error)) from error
            raise
        return RayWorker(handle, serving)

    async def find(self) -> Mapping[str, RayWorker]:
        """See `Launcher`."""
        newest: dict[str, tuple[int, RayWorker]] = {}
        for name in ray.util.list_named_actors():
            replica, _, epoch = name.rpartition(".")
            if not (replica.startswith("replica-") and epoch.isdecimal()):
                continue
            with contextlib.suppress(ValueError):  # it ended meanwhile
                handle = ray.get_actor(name)
                worker = await _describe(handle)
                old = newest.get(replica)
                if worker is None or (old is not None and old[0] > int(epoch)):
                    ray.kill(handle)
                    continue
                if old is not None:
                    await old[1].end()
                newest[replica] = (int(epoch), worker)
        return {replica: worker for replica, (_, worker) in newest.items()}

    def _device(self) -> Literal["cpu", "cuda"]:
        """What auto means in this cluster; all replicas get the same."""
        device, num_replicas = self._config.engine.device, self._config.fleet.num_replicas
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        if device == "cpu" or (device == "auto" and num_gpus == 0):
            return "cpu"
        if num_gpus < num_replicas:
            raise ConfigError(
                f"{num_replicas} replicas need a GPU each, but the Ray cluster has {num_gpus}: serve fewer replicas, "
                "or all of them on CPUs with device cpu"
            )
        return "cuda"

    def _num_node_workers(self) -> int:
        num_nodes = sum(node["Alive"] for node in ray.nodes())
        return math.ceil(self._config.fleet.num_replicas / max(1, num_nodes))


async def _describe(handle: ActorHandle) -> RayWorker | None:
    """The worker behind a handle; None if it does not serve."""
    try:
        serving: ServingWorker | None = await asyncio.wait_for(handle.describe.remote(), _DESCRIBE_TIMEOUT_S)
    except (RayError, TimeoutError):
        return None
    return None if serving is None else RayWorker(handle, serving)


def _cause_of_death(error: RayError) -> str:
    """Ray's account without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "its process ended: " + " ".join(lines[:3])
