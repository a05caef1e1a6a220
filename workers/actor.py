"""One worker as a Ray actor: an engine and its gRPC server in a process of their own.

Ray starts and ends the process and carries `start`, `describe` and `wait`; requests and tokens go over gRPC. The server has a
thread and event loop of its own, so that neither waits for the other. When the engine fails (its device is lost) the process
ends, which is what the controller watches.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import ray

from ..common import garbage, logs
from ..common.config import EngineConfig, ModelConfig
from ..common.errors import InternalError, PilotfishError
from ..common.identity import Identity
from ..common.rank_place import RankPlace
from ..common.requests import ServingWorker
from ..proto.versions import own_versions
from .cpu_threads import share_of_machine
from .engine_interface import FAILED_PHASE, EngineInterface

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.5
_LAST_WORD_S = 1.2  # a heartbeat tells the controller why
_EXIT_CODE_ENGINE_FAILED = 70


class WorkerActor:
    """The launcher makes it a Ray actor with a few threads (`wait` holds one). It serves from `start` until it is killed."""

    def __init__(self, name: str) -> None:
        replica, _, rank = name.partition("/")
        logs.set_up(replica, rank=int(rank) if rank else None)
        self._versions = own_versions(ray.util.get_node_ip_address())  # as loaded here, whatever is installed later
        self._serving: ServingWorker | None = None
        self._rendezvous: object = None  # held open

    def versions(self) -> dict[str, str]:
        """Asked before all else: see proto/versions.py."""
        return self._versions

    def node_id(self) -> str:
        """Ray's id of the node it runs on."""
        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    def unreachable(self, addresses: list[str], *, timeout_s: float) -> list[str]:
        """Those of the addresses "host:port", where something listens, that this machine cannot connect to."""

        def is_missed(address: str) -> bool:
            host, _, port = address.rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=timeout_s).close()
            except OSError:
                return True
            return False

        with ThreadPoolExecutor(max(1, len(addresses))) as threads:
            missed = threads.map(is_missed, addresses)
        return [address for address, miss in zip(addresses, missed, strict=True) if miss]

    def open_rendezvous(self, *, timeout_s: float) -> str:
        """Asked of a replica's first rank: the address where all ranks find each other."""
        from .comm import Rendezvous

        rendezvous = Rendezvous(host=ray.util.get_node_ip_address(), timeout_s=timeout_s)
        self._rendezvous = rendezvous
        return rendezvous.address

    def start(
        self,
        *,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        epoch: int,
        identity: Identity,
        controller_node: str,
        num_node_workers: int,
        place: RankPlace | None = None,
    ) -> ServingWorker | None:
        """Load the model and serve; returns when requests can come. A rank that is not the leader follows it, and returns None.

        Args:
            engine_config: with the device settled, cpu or cuda.
            identity: what this worker shows to the other parts of the cluster.
            controller_node: Ray's id of the controller's node: a worker there listens on the loopback address only.
            num_node_workers: how many workers share this node's cores and memory.
            place: among the ranks of the replica, where it has several; `host`, `identity` and `gpu` are filled in here.

        Raises:
            PilotfishError: why it cannot start.
        """
        try:
            if engine_config.device == "cpu":
                engine_config = share_of_machine(engine_config, num_node_workers)
            if place is not None:
                gpu = own_gpu(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"))
                place = replace(place, host=ray.util.get_node_ip_address(), identity=identity, gpu=gpu)
            if place is not None and not place.is_leader:
                self._follow(model_config, engine_config, place)
            else:
                self._serving = self._serve(
                    model_config, engine_config, place, epoch=epoch, identity=identity, controller_node=controller_node
                )
        except PilotfishError:
            raise
        except Exception as error:
            logger.exception("the worker cannot start")
            raise InternalError(f"the worker failed while starting: {type(error).__name__}: {error}") from error
        return self._serving

    def describe(self) -> ServingWorker | None:
        """What `start` returned; None if it has not yet."""
        return self._serving

    def wait(self, timeout_s: float) -> None:
        """Returns after `timeout_s`; fails when the process ends before."""
        threading.Event().wait(timeout_s)

    def _follow(self, model_config: ModelConfig, engine_config: EngineConfig, place: RankPlace) -> None:
        # Imported here and below: this class also travels through the controller's process, which has no use for torch.
        with garbage.imports():
            from .ranks import Follower

        Follower(model_config, engine_config, place, on_end=_end_process).start()
        logger.info("rank %d of %d follows under epoch %d", place.number, place.num_ranks, place.epoch)

    def _serve(
        self,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        place: RankPlace | None,
        *,
        epoch: int,
        identity: Identity,
        controller_node: str,
    ) -> ServingWorker:
        with garbage.imports():
            from .engine import Engine
            from .ranks import lead
            from .server import WorkerServer
            from .worker_service import ServerLimits

        server = WorkerServer(ServerLimits(), identity)
        set_up = None if place is None else partial(lead, place=place)
        engine = Engine(model_config, engine_config, on_step=server.on_step, set_up=set_up)
        info = replace(engine.start(), epoch=epoch, pid=os.getpid(), model_version=model_config.model_version)
        is_local = ray.get_runtime_context().get_node_id() == controller_node
        node = ray.util.get_node_ip_address()
        address = server.start(engine, info, host="127.0.0.1" if is_local else node)
        threading.Thread(target=_exit_when_failed, args=(engine,), name="engine-watch", daemon=True).start()
        logger.info("serving %s at %s under epoch %d", info.model_name, address, epoch)
        return ServingWorker(address=address, node=node, info=info, rank=0 if place is None else place.number)


def own_gpu(assigned: Sequence[int | str], visible: str | None) -> int:
    """The number by which CUDA knows, in this process, the GPU that Ray assigned to it; 0 where it has none.

    Ranks see all GPUs of their node (see the launcher), or those that Ray was started with; both are named as in `visible`.
    """
    if not assigned:
        return 0
    names = [name.strip() for name in visible.split(",")] if visible else []
    return names.index(str(assigned[0])) if names else int(assigned[0])


def _exit_when_failed(engine: EngineInterface) -> None:
    """A process whose engine cannot go on is of no use; its successor gets a fresh device."""
    while (health := engine.health()).phase != FAILED_PHASE:
        threading.Event().wait(_WATCH_INTERVAL_S)
    threading.Event().wait(_LAST_WORD_S)
    _end_process(f"the engine failed: {health}")


def _end_process(reason: str) -> None:
    logger.critical("%s; this process ends", reason)
    logging.shutdown()
    os._exit(_EXIT_CODE_ENGINE_FAILED)
