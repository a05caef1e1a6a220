"""Ray's autoscaler with its fake provider, whose nodes are raylets on one host: pilotfish asks for nodes and frees them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from host_network import SHARED, HostNetwork
from processes import stopped
from ray_hosts import PROMPT, RayHosts

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(500)]

MACHINE = {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "node_config": {}, "min_workers": 0, "max_workers": 2}
HEAD = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
COMMANDS += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")
AUTOSCALING: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 2,
    "provider": {
        "type": "fake_multinode",
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "use_node_id_as_ip": True,
    },
    "available_node_types": {"ray.head.default": HEAD, "machine": MACHINE},
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.2,
    "auth": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **{name: [] for name in COMMANDS},
}
NUM_TOKENS = 400


class FakeNodes(RayHosts):
    """A host on which Ray's autoscaler makes nodes of itself."""

    def __init__(self, network: HostNetwork) -> None:
        self.network = network
        (self.head,) = network.hosts.values()
        (network.shared / "autoscaling.json").write_text(json.dumps(AUTOSCALING))

    def up(self) -> str:
        variables = ("RAY_FAKE_CLUSTER=1", "RAY_enable_autoscaler_v2=0", "AUTOSCALER_UPDATE_INTERVAL_S=1")
        options = ("--num-cpus=0", "--object-store-memory=100000000", "--disable-usage-stats", "--include-dashboard=false")
        options += ("--include-log-monitor=false",)
        start = ("ray", "start", "--head", "--port=6379", f"--autoscaling-config={SHARED}/autoscaling.json", *options)
        return self.head.run("env", "RAY_AUTH_MODE=disabled", *variables, *start, timeout_s=150).stdout

    def pilotfish(self, *words: str, check: bool = True) -> str:
        return self.head.run("env", "RAY_AUTH_MODE=disabled", "pilotfish", *words, check=check, timeout_s=200).stdout

    def worker(self) -> int:
        """The process of the one replica that there is."""
        (pid,) = [pid for pid, line in self.head.processes().items() if "ray::WorkerActor" in line]
        return pid

    def num_nodes(self) -> int:
        """The head too."""
        return sum("/raylet/raylet " in line for line in self.head.processes().values())


@pytest.fixture(scope="module")
def nodes(possible_here: None, model_path: Path) -> Iterator[FakeNodes]:
    with HostNetwork("head") as network:
        (network.shared / "tiny").mkdir()
        for file in model_path.iterdir():
            (network.shared / "tiny" / file.name).write_bytes(file.read_bytes())
        hosts = FakeNodes(network)
        print(hosts.up())
        yield hosts


def test_nodes_come_with_the_load_and_go_with_it(nodes: FakeNodes, expected: tuple[str, list[int]]) -> None:
    assert nodes.num_nodes() == 1
    up = f"up {SHARED}/tiny --served-name tiny --host 0.0.0.0 --device cpu --num-kv-blocks 512 --num-threads 1 --max-num-seqs 2"
    # The first replica must not go before the streams come: their processes take seconds to start, more on a slow machine.
    elastic = "--cpus-per-rank 1 --min-replicas 0 --max-replicas 2 --target-wait-s 0.5 --shrink-after-s 5 --idle-timeout-s 25"
    print(nodes.pilotfish(*up.split(), *elastic.split(), "--heartbeat-timeout-s", "200"))
    assert nodes.num_nodes() == 2
    watch = nodes.client("watch")
    streams = [nodes.client("stream", PROMPT, str(NUM_TOKENS)) for _ in range(8)]

    def seen() -> list[list[str]]:
        """Name, state, message and restarts of each replica, whenever anything of it had changed."""
        return [replica for event in watch.events for replica in event["replicas"]]

    wait_until(lambda: any(stream.num_tokens for stream in streams), "the first tokens", 100)
    with stopped(nodes.worker()):  # so the rest waits for the second replica, however fast this machine is
        wait_until(lambda: any("waits for a node" in message for _, _, message, _ in seen()), "the wait to be shown", 100)
        wait_until(lambda: ["replica-1", "ready", "", 0] in seen(), "a second replica", 100)
        assert nodes.num_nodes() == 3
        print(nodes.pilotfish("status"))
        wait_until(lambda: any(stream.has_ended for stream in streams), "what waited to be served there", 100)
    ends = [stream.finish(100) for stream in streams]
    assert all(end["token_ids"] == expected[1][:NUM_TOKENS] for end in ends)
    assert {end["usage"]["replica"] for end in ends} == {"replica-0", "replica-1"}
    wait_until(lambda: watch.events[-1]["replicas"] == [], "all replicas to go", 80)
    wait_until(lambda: nodes.num_nodes() == 1, "all nodes to go", 60)
    back = nodes.client("stream", PROMPT, "100").finish(100)
    assert back["token_ids"] == expected[1][:100]
    assert nodes.num_nodes() == 2
    watch.stop()
    print(seen())
    assert not any(state in ("lost", "failed") for _, state, _, _ in seen())


def wait_until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)
