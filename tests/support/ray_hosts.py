"""The repository's cluster.yaml on hosts that are namespaces: the same file, with their addresses and less of everything."""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from host_network import SHARED, Host, HostNetwork

ROOT = Path(__file__).parents[2]
PORT = 50051
PROMPT = "It was a dark and stormy night"
_CLIENT = Path(__file__).with_name("hosts_client.py")
_CLUSTER_FILE = SHARED / "cluster.yaml"
_UP_TIMEOUT_S = 200.0
_DOWN_TIMEOUT_S = 100.0


class RayHosts:
    """A Ray cluster over a HostNetwork whose first host is the head."""

    def __init__(self, network: HostNetwork, *, serve: str) -> None:
        """`serve`: the words after `pilotfish up`."""
        self.network = network
        self.head, *self.workers = network.hosts.values()
        (network.shared / "cluster.yaml").write_text(yaml.safe_dump(self._configuration(serve)))

    def up(self) -> str:
        self.network.operator.run("ray", "get-auth-token", "--generate")
        return self.network.operator.run(
            "ray", "up", "-y", "--no-config-cache", str(_CLUSTER_FILE), timeout_s=_UP_TIMEOUT_S
        ).stdout

    def down(self) -> str:
        return self.network.operator.run("ray", "down", "-y", str(_CLUSTER_FILE), timeout_s=_DOWN_TIMEOUT_S).stdout

    def pilotfish(self, *words: str, check: bool = True) -> str:
        """The command, on the head as after `ray attach`."""
        return self.head.run("bash", "-lc", f"RAY_AUTH_MODE=token pilotfish {shlex.join(words)}", check=check).stdout

    def ranks(self) -> dict[str, int]:
        """How many of pilotfish's worker processes each host has."""
        lines = {host.name: host.processes().values() for host in self.network.hosts.values() if host.pid}
        return {name: num for name, found in lines.items() if (num := sum("ray::WorkerActor" in line for line in found))}

    def named_actors(self) -> list[str]:
        """Of all namespaces."""
        return [str(name) for name in self._asked("ray.util.list_named_actors(all_namespaces=True)")]

    def wait_for_nodes(self, num_nodes: int, timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while (alive := sum(self._asked("[node['Alive'] for node in ray.nodes()]"))) < num_nodes:
            assert time.monotonic() < deadline, f"Ray has {alive} of {num_nodes} nodes after {timeout_s:g} s"
            time.sleep(1)

    def ray_processes(self) -> dict[str, list[str]]:
        """Ray's own on each host: raylets, GCS, workers. (Where `ray stop` has not run, its log monitor and agents stay.)"""
        return {host.name: found for host in self.network.hosts.values() if host.pid and (found := _of_ray(host))}

    def _asked(self, expression: str) -> list[Any]:
        script = "import ray, json; ray.init('auto', logging_level='ERROR', log_to_driver=False); "
        script += f"print(json.dumps({expression}))"
        done = self.head.run("env", "RAY_AUTH_MODE=token", "python", "-c", script)
        answer: list[Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def client(self, *words: str) -> Events:
        """hosts_client.py, in the operator's place."""
        command = ("python", str(_CLIENT), f"{self.head.address}:{PORT}", *words)
        return Events(self.network.operator.popen(*command, stdout=subprocess.PIPE))

    def _configuration(self, serve: str) -> dict[str, Any]:
        config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
        addresses = [worker.address for worker in self.workers]
        config["provider"] |= {"head_ip": self.head.address, "worker_ips": addresses}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.network.key)}
        config["min_workers"] = config["max_workers"] = len(addresses)
        for part, num_cpus in (("head", 0), ("worker", 1)):
            commands = config[f"{part}_start_ray_commands"]
            # The autoscaler looks every 5 s, here every second; a worker that has lost the head ends after 60 s, here after 10;
            # nobody reads the logs that Ray would gather.
            small = "RAY_gcs_rpc_server_reconnect_timeout_s=10 " if part == "worker" else "AUTOSCALER_UPDATE_INTERVAL_S=1 "
            small += f"ray start --num-cpus={num_cpus} --object-store-memory=100000000"
            small += " --disable-usage-stats --include-log-monitor=false"
            commands = [command.replace("ray start", small) for command in commands]
            config[f"{part}_start_ray_commands"] = [
                command.partition("pilotfish up")[0] + f"pilotfish up {serve}" if "pilotfish up" in command else command
                for command in commands
            ]
        return config


class Events(threading.Thread):
    """What a client's process prints, a dict a line, with the time of its arrival as `at`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.events: list[dict[str, Any]] = []
        self._process = process
        self.start()

    def run(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.events.append(json.loads(line) | {"at": time.monotonic()})

    @property
    def num_tokens(self) -> int:
        return sum(event.get("num_tokens", 0) for event in self.events)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def finish(self, timeout_s: float) -> dict[str, Any]:
        """The last event of a client that has ended well."""
        self._process.wait(timeout_s)
        self.join(timeout_s)
        assert self._process.returncode == 0
        return self.events[-1]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(20)
        self.join(20)


def _of_ray(host: Host) -> list[str]:
    kinds = ("/raylet/raylet ", "/gcs_server ", "default_worker.py", "ray::WorkerActor", "ray::ControllerActor", "ray::IDLE")
    return [line for line in host.processes().values() if any(kind in line for kind in kinds)]
