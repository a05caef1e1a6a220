"""A Ray of this process's own, without what tests do not look at, and more nodes for it: raylets of this machine that have
resources of their own."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import ray
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

_OBJECT_STORE_BYTES = 100_000_000


class _Head(Node):  # type: ignore[misc]
    def start_api_server(self, **options: Any) -> None:
        """`include_dashboard=False` would start it without its pages."""


@contextmanager
def own_ray(*, num_cpus: int, namespace: str) -> Iterator[None]:
    """Started and joined; it ends with the block. Every process of it that is not needed saves a second of processor time."""
    directory = tempfile.mkdtemp(prefix="pf-ray-", dir="/tmp")  # short: Ray puts sockets there
    parameters = RayParams(
        temp_dir=directory,
        node_ip_address=ray.util.get_node_ip_address(),  # it would take 127.0.0.1 for this when it is joined
        num_cpus=num_cpus,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_log_monitor=False,
        no_monitor=True,  # of Ray's autoscaler
        _system_config={"prestart_worker_first_driver": False},
    )
    head = _Head(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
    try:
        ray.init(head.address, namespace=namespace, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        head.kill_all_processes(check_alive=False, allow_graceful=True)
        shutil.rmtree(directory, ignore_errors=True)


class RayNodes:
    """`add` nodes; `notify` one that it is to go, as a cloud does before it takes a machine. The `with` block ends them."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._gcs_address = ray.get_runtime_context().gcs_address

    def add(self, **resources: int) -> str:
        """The id of a node, once Ray has it."""
        parameters = RayParams(
            gcs_address=self._gcs_address,
            redis_address=self._gcs_address,
            node_ip_address="127.0.0.1",
            num_cpus=resources.pop("CPU", 0),
            num_gpus=0,
            resources=resources,
            object_store_memory=_OBJECT_STORE_BYTES,
            min_worker_port=0,
            max_worker_port=0,
            node_manager_port=0,
            include_log_monitor=False,
        )
        node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False, connect_only=False)
        self._nodes[node.node_id] = node
        deadline = time.monotonic() + 30
        while not any(known["NodeID"] == node.node_id and known["Alive"] for known in ray.nodes()):
            assert time.monotonic() < deadline, "Ray has not taken up its new node within 30 s"
            time.sleep(0.05)
        return node.node_id

    def notify(self, node_id: str, *, within_s: float) -> None:
        """`ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION`."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + within_s) * 1000)
        is_accepted, why_not = GcsClient(address=self._gcs_address).drain_node(node_id, reason, "a test", deadline_ms)
        assert is_accepted, why_not

    def is_alive(self, node_id: str) -> bool:
        return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for node in self._nodes.values():
            node.kill_all_processes(check_alive=False, allow_graceful=True)
        deadline = time.monotonic() + 60
        while any(map(self.is_alive, self._nodes)):  # until then Ray may place what comes next there
            assert time.monotonic() < deadline, "Ray has not seen its nodes' end within 60 s"
            time.sleep(0.05)
