"""Worker processes as Ray actors: detached and named, so that a restarted controller finds them again.

A replica is one actor a rank, all in one Ray placement group (see ray_placement.py), unless it is one rank that takes neither a
GPU nor a CPU in Ray's books; the tensor ranks of a data rank are neighbours, and the first of them takes its requests. An
actor's name is "<replica>.<epoch>.<rank>" and the group's "<replica>.<epoch>", in the cluster's namespace. The ranks end
together: when one has died the others are of no use. The actor class is handed in: the controller does not know workers/.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..common import logs
from ..common.config import ModelConfig, ServeConfig
from ..common.errors import ConfigError, PilotfishError
from ..common.rank_place import LEADER, RankPlace
from ..common.requests import ServingWorker
from ..proto.versions import mismatch, own_versions
from .authority import Authority
from .layouts import rank_bundle
from .node_links import NodeLinks
from .node_notices import NodeNotices
from .ray_actors import cause_of_death, until_dead
from .ray_placement import find_group, is_any_gone, place, reachable_only
from .worker_process import NoRoom, WorkerDied, worker_name

logger = logging.getLogger(__name__)

_NUM_THREADS = 4
_ROOM_TIMEOUT_S = 60.0
_NOTICE_PAUSE_S = 5.0
_DESCRIBE_TIMEOUT_S = 5.0
_LOOK_TIMEOUT_S = 2.0
_CPU_BUNDLE = {"CPU": 0.001}  # Ray places no bundle of nothing
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # the kernels have threads of their own, which OpenMP's idle ones would slow down
    "NCCL_NVLS_ENABLE": "0",  # NVLink multicast
}
# Ranks see all GPUs of their node, so that they can map each other's memory, and take the one that Ray assigns to each.
_RANK_ENVIRONMENT = {**_ENVIRONMENT, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


class RayWorker:
    """A WorkerProcess: the ranks of one replica, in order."""

    def __init__(
        self,
        handles: list[ActorHandle],
        hosts: list[str],
        places: list[ServingWorker],
        group: PlacementGroup | None,
        notices: NodeNotices,
    ) -> None:
        self._handles = handles
        self._hosts = hosts
        self._group = group
        self._notices = notices
        self._nodes: list[str] = []  # Ray's ids, once known
        self.places = places

    async def wait_dead(self) -> str:
        waits = [asyncio.create_task(self._wait_rank_dead(rank)) for rank in range(len(self._handles))]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return " and ".join(sorted(task.result() for task in done))
        finally:
            for task in waits:
                task.cancel()

    async def wait_notice(self) -> float:
        while True:
            try:
                self._nodes = await asyncio.gather(*(handle.node_id.remote() for handle in self._handles))
                return await self._notices.wait_for(self._nodes)
            except RayError:  # it dies, which is heard elsewhere, or Ray has lost sight of it for a moment
                await asyncio.sleep(_NOTICE_PAUSE_S)

    async def has_lost_machine(self) -> bool:
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT_S):
                return await self._notices.is_any_about_to_go(self._nodes) or await is_any_gone(self._nodes)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises while its head is away
            logger.warning("Ray cannot be asked whether the nodes of a lost replica are there: %s", error)
            return False

    async def end(self) -> None:
        _end(self._handles, self._group)

    async def _wait_rank_dead(self, rank: int) -> str:
        whose = f"rank {rank} on " if len(self._handles) > 1 else "on "
        return f"{whose}{self._hosts[rank]}: {await until_dead(self._handles[rank])}"


class RayLauncher:
    """Starts workers in the namespace of the calling actor. The configuration's device is settled."""

    def __init__(self, worker_class: ActorClass, config: ServeConfig, authority: Authority) -> None:
        self._worker_class = worker_class
        self._authority = authority
        self._config = config
        self._links = NodeLinks()
        self._notices = NodeNotices()
        self._node = ray.get_runtime_context().get_node_id()
        self._versions = own_versions(ray.util.get_node_ip_address())

    async def launch(self, replica: str, *, epoch: int, model: ModelConfig, on_wait: Callable[[str], None]) -> RayWorker:
        """See `Launcher`."""
        device = self._config.engine.device
        assert device != "auto", "deploy has settled it"
        handles: list[ActorHandle] = []
        group = None
        try:
            if (bundle := rank_bundle(self._config.parallel, device)) or self._num_ranks > 1:
                group = await place(
                    f"{replica}.{epoch}",
                    bundle or _CPU_BUNDLE,
                    num_ranks=self._num_ranks,
                    data_ranks=self._config.parallel.data_parallel,
                    placement=self._config.parallel.placement,
                    timeout_s=self._config.fleet.start_timeout_s if self._config.fleet.is_elastic else _ROOM_TIMEOUT_S,
                    on_wait=on_wait,
                    without=self._links.to_avoid(),
                )
            where = await _where(group, self._num_ranks)
            for rank in range(self._num_ranks):
                handles.append(self._make_actor(replica, epoch, rank, device, where[rank]))
            versions = await asyncio.gather(*(handle.versions.remote() for handle in handles))
            if problem := mismatch(self._versions, versions):
                raise ConfigError(problem)
            if group is not None and self._num_ranks > 1:
                await self._links.check(handles, group)
            places = await self._start_ranks(handles, replica, epoch, model)
        except BaseException as error:
            _end(handles, group)
            if isinstance(error, NoRoom):
                self._links.forget()
            if isinstance(error, RayTaskError) and isinstance(error.cause, PilotfishError):
                raise error.cause from None
            if isinstance(error, RayError):
                raise WorkerDied(cause_of_death(error)) from error
            raise
        self._links.forget()
        return RayWorker(handles, [version["node"] for version in versions], places, group, self._notices)

    @property
    def _num_ranks(self) -> int:
        return self._config.parallel.num_ranks

    def _make_actor(self, replica: str, epoch: int, rank: int, device: str, where: Mapping[str, Any]) -> ActorHandle:
        log = self._config.log
        log_variables = logs.environment(log_level=log.log_level, log_format=log.log_format)
        return self._worker_class.options(
            name=worker_name(replica, epoch=epoch, rank=rank),
            lifetime="detached",
            max_restarts=0,
            max_concurrency=_NUM_THREADS,
            num_cpus=self._config.parallel.cpus_per_rank,
            num_gpus=1 if device == "cuda" else 0,
            runtime_env={"env_vars": {**(_ENVIRONMENT if self._num_ranks == 1 else _RANK_ENVIRONMENT), **log_variables}},
            **where,
        ).remote(replica if self._num_ranks == 1 else f"{replica}/{rank}")

    async def _start_ranks(
        self, handles: list[ActorHandle], replica: str, epoch: int, model: ModelConfig
    ) -> list[ServingWorker]:
        """Starts all ranks together, and returns those that serve; the first that cannot start says why."""
        parallel = self._config.parallel
        timeout_s, size = parallel.collective_timeout_s, parallel.tensor_parallel
        address = ""
        if len(handles) > 1:
            address = await handles[LEADER].open_rendezvous.remote(timeout_s=timeout_s)
        starts = []
        for rank, handle in enumerate(handles):
            place = None
            if len(handles) > 1:
                place = RankPlace(
                    rank=rank % size,
                    size=size,
                    data_rank=rank // size,
                    data_size=parallel.data_parallel,
                    epoch=epoch,
                    address=address,
                    host="",
                    timeout_s=timeout_s,
                    start_timeout_s=self._config.fleet.start_timeout_s,
                    whole_experts=parallel.expert_parallel,
                    num_redundant_experts=parallel.redundant_experts,
                    rebalance_interval_steps=parallel.rebalance_interval_steps,
                    leader_name=worker_name(replica, epoch=epoch, rank=rank - rank % size),
                )
            starts.append(
                asyncio.ensure_future(
                    handle.start.remote(
                        model_config=model,
                        engine_config=self._config.engine,
                        epoch=epoch,
                        identity=self._authority.issue(worker_name(replica, epoch=epoch, rank=rank)),
                        controller_node=self._node,
                        num_node_workers=self._num_node_workers(),
                        place=place,
                    )
                )
            )
        await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
        for start in starts:  # the cause comes before the others' complaints about it
            if start.done() and (error := start.exception()) is not None:
                raise error
        return [serving for start in starts if (serving := start.result()) is not None]

    async def find(self) -> Mapping[str, RayWorker]:
        """See `Launcher`."""
        ranks: dict[str, dict[int, dict[int, ActorHandle]]] = {}
        for name in ray.util.list_named_actors():
            replica, _, rest = name.partition(".")
            epoch, _, rank = rest.partition(".")
            if replica.startswith("replica-") and epoch.isdecimal() and rank.isdecimal():
                with contextlib.suppress(ValueError):  # it ended meanwhile
                    ranks.setdefault(replica, {}).setdefault(int(epoch), {})[int(rank)] = ray.get_actor(name)
        found: dict[str, RayWorker] = {}
        for replica, epochs in ranks.items():
            for epoch in sorted(epochs, reverse=True):
                group = find_group(f"{replica}.{epoch}")
                handles = [epochs[epoch][rank] for rank in sorted(epochs[epoch])]
                worker = None
                if replica not in found and len(handles) == self._num_ranks:
                    worker = await self._take_over(handles, group)
                if worker is not None:
                    found[replica] = worker
                else:
                    _end(handles, group)
        return found

    async def _take_over(self, handles: list[ActorHandle], group: PlacementGroup | None) -> RayWorker | None:
        """What an earlier controller started; None if it does not serve, or runs what this controller does not fit."""
        try:
            async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
                versions = await asyncio.gather(*(handle.versions.remote() for handle in handles))
                if problem := mismatch(self._versions, versions):
                    logger.warning("a worker of an earlier controller is ended: %s", problem)
                    return None
                leaders = handles[:: self._config.parallel.tensor_parallel]
                places = await asyncio.gather(*(leader.describe.remote() for leader in leaders))
        except (RayError, TimeoutError):
            return None
        if None in places:
            return None
        return RayWorker(handles, [version["node"] for version in versions], places, group, self._notices)

    def _num_node_workers(self) -> int:
        """On a node, as far as can be known: more nodes may come."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = math.ceil(self._config.fleet.most * self._num_ranks / max(1, len(nodes)))
        if num_cpus := self._config.parallel.cpus_per_rank:
            share = min(share, max(1, int(max(node.get("CPU", 0.0) for node in nodes) / num_cpus)))
        return share


async def _where(group: PlacementGroup | None, num_ranks: int) -> list[dict[str, Any]]:
    """What tells Ray where each rank goes: to its bundle, or, alone, to any node that answers."""
    if group is not None:
        numbers = [rank * group.bundle_count // num_ranks for rank in range(num_ranks)]
        bundles = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number) for number in numbers]
        return [{"scheduling_strategy": bundle} for bundle in bundles]
    selector = await reachable_only()
    return [{"scheduling_strategy": "SPREAD"} | ({"label_selector": selector} if selector else {})]


def _end(handles: list[ActorHandle], group: PlacementGroup | None) -> None:
    for handle in handles:
        ray.kill(handle)
    if group is not None:
        remove_placement_group(group)
