"""The real thing on Ray: a controller, two workers with a tiny random Llama, and what happens when any of them is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import grpc
import pytest
import ray
from pilotfish.client import Client
from pilotfish.common.config import GatewayConfig
from pilotfish.common.errors import ConfigError
from pilotfish.controller.deployment import Deployment, _with_ports, deploy, find
from pilotfish.controller.service import Addresses
from pilotfish.workers.actor import WorkerActor
from ray_serving import PROMPT, Reader, Served, all_ready, config, wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def served(local_ray: None, model_path: Path) -> Iterator[Served]:
    deployment = deploy(config(model_path), model_path=str(model_path), worker_class=ray.remote(WorkerActor))
    try:
        yield Served(deployment, deployment.wait_ready(timeout_s=120))
    finally:
        deployment.shutdown()


def test_requests_are_served_and_the_controller_has_no_torch(served: Served) -> None:
    reader = Reader(served, max_tokens=40).finish()
    assert len(reader.token_ids) == 40
    assert reader.usage.prompt_tokens == len(PROMPT)
    state = served.deployment.status()
    assert "libtorch" in Path(f"/proc/{state.replicas[0].info.pid}/maps").read_text()
    assert "libtorch" not in Path(f"/proc/{state.controller_pid}/maps").read_text()


def test_a_killed_worker_costs_no_token(served: Served) -> None:
    expected = Reader(served, max_tokens=250).finish()
    reader = Reader(served, max_tokens=250)
    reader.wait_for(50)
    state = served.deployment.status()
    victim = next(r for r in state.replicas if r.load.num_running)
    os.kill(victim.info.pid, signal.SIGKILL)
    reader.finish()
    assert reader.token_ids == expected.token_ids
    assert reader.text == expected.text
    assert reader.usage.completion_tokens == 250
    assert reader.usage.replica != victim.name
    wait_until(lambda: all_ready(served.deployment, restarts=1), "the worker's successor")
    successor = next(r for r in served.deployment.status().replicas if r.name == victim.name)
    assert successor.info.epoch > victim.info.epoch


def test_a_killed_controller_comes_back_with_the_same_workers(served: Served) -> None:
    """A plain call ends with the process; the SDK's goes on at the next token."""
    before = served.deployment.status()
    greedy = {"max_tokens": 250, "temperature": 0, "ignore_eos": True}
    with Client(served.addresses.grpc, timeout_s=60) as client:
        undisturbed = client.generate(PROMPT, **greedy)
        stream = client.stream_generate(PROMPT, **greedy)
        while len(stream.completion.token_ids) < 20:
            next(stream)
        reader = Reader(served, max_tokens=1500)
        reader.wait_for(20)
        os.kill(before.controller_pid, signal.SIGKILL)
        reader.join(30)
        assert isinstance(reader.error, grpc.RpcError)
        completion = stream.read_all()
    assert completion.token_ids == undisturbed.token_ids
    assert completion.text == undisturbed.text
    assert completion.usage.completion_tokens == 250
    wait_until(lambda: all_ready(served.deployment, restarts=0), "the controller's successor")
    after = served.deployment.status()
    assert after.controller_pid != before.controller_pid
    assert (after.grpc_address, after.http_address) == (before.grpc_address, before.http_address)
    assert [r.info.pid for r in after.replicas] == [r.info.pid for r in before.replicas]
    assert len(Reader(served, max_tokens=30).finish().token_ids) == 30
    wait_until(lambda: _load(served.deployment) == (0, 0), "the orphaned request's end")


def _load(deployment: Deployment) -> tuple[int, int]:
    """Sequences running and blocks in use on all workers."""
    replicas = deployment.status().replicas
    return sum(r.load.num_running for r in replicas), sum(r.load.num_used_blocks for r in replicas)


def test_one_controller_a_namespace(served: Served, model_path: Path) -> None:
    with pytest.raises(ConfigError, match="serves a model already"):
        deploy(config(model_path), model_path=str(model_path), worker_class=ray.remote(WorkerActor))
    assert find() is not None


def test_shutdown_ends_every_actor_and_process(served: Served) -> None:
    state = served.deployment.status()
    pids = [state.controller_pid, *(r.info.pid for r in state.replicas)]
    served.deployment.shutdown()
    assert ray.util.list_named_actors() == []
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the processes' end")
    assert find() is None


def test_sigterm_lets_running_requests_end(local_ray: None, model_path: Path) -> None:
    """`pilotfish serve` refuses what comes after it, drops nothing, and leaves nothing."""
    options = "--device cpu --num-kv-blocks 512 --num-threads 1 --grpc-port 0 --http-port 0 --grace-s 50"
    command = [sys.executable, "-m", "pilotfish.cli.main", "serve", str(model_path), *options.split()]
    command += ["--ray-namespace", "pilotfish-sigterm"]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as serve:
        try:
            assert serve.stderr is not None
            lines = iter(serve.stderr.readline, "")
            address = next(line.split()[1] for line in lines if line.strip().startswith("gRPC"))
            assert "libtorch" not in Path(f"/proc/{serve.pid}/maps").read_text()  # most of what its start would take
            served = Served(cast(Deployment, None), Addresses(grpc=address))
            readers = [Reader(served, max_tokens=300) for _ in range(4)]
            for reader in readers:
                reader.wait_for(5)
            serve.send_signal(signal.SIGTERM)
            wait_until(lambda: Reader(served, max_tokens=1).refused(), "a refusal")
            tokens = [reader.finish().token_ids for reader in readers]
            assert [len(token_ids) for token_ids in tokens] == [300] * 4
            assert all(token_ids == tokens[0] for token_ids in tokens)
            assert serve.wait(60) == 0, serve.stderr.read()
        finally:
            serve.kill()
    assert [
        actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == "pilotfish-sigterm"
    ] == []


def test_a_worker_of_other_versions_is_refused(local_ray: None, model_path: Path) -> None:
    class OlderWorker(WorkerActor):
        def versions(self) -> dict[str, str]:
            return super().versions() | {"pilotfish": "0.0.1"}

    one = config(model_path, num_replicas=1)
    deployment = deploy(one, model_path=str(model_path), worker_class=ray.remote(OlderWorker))
    try:
        both = r"node [\d.]+ has pilotfish 0\.0\.1, and the controller's node [\d.]+ has pilotfish 0\.1"
        with pytest.raises(ConfigError, match=both):
            deployment.wait_ready(timeout_s=60)
    finally:
        deployment.shutdown()
    assert ray.util.list_named_actors() == []


def test_a_port_in_use_is_named(local_ray: None, model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        deployment = deploy(
            config(model_path, grpc_port=port), model_path=str(model_path), worker_class=ray.remote(WorkerActor)
        )
        try:
            with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*--grpc-port"):
                deployment.wait_ready(timeout_s=60)
        finally:
            deployment.shutdown()


def test_clients_of_gateways_see_no_gap_when_the_controller_or_their_gateway_is_killed(
    local_ray: None, model_path: Path
) -> None:
    """Two gateways share one address. A controller that is killed costs their clients a pause; a gateway that is killed costs
    its HTTP clients the connection, and the SDK's nothing."""
    deployment = deploy(
        config(model_path, num_replicas=1, num_gateways=2), model_path=str(model_path), worker_class=ray.remote(WorkerActor)
    )
    try:
        served = Served(deployment, deployment.wait_ready(timeout_s=120))
        wait_until(lambda: all(gateway.is_connected for gateway in deployment.status().gateways), "the gateways")
        before = deployment.status()
        assert {gateway.grpc_address for gateway in before.gateways} == {served.addresses.grpc}
        assert len({gateway.pid for gateway in before.gateways} | {before.controller_pid}) == 3
        expected = Reader(served, max_tokens=250).finish()

        over_grpc, over_http = Reader(served, max_tokens=250), HttpReader(served, max_tokens=250)
        over_grpc.wait_for(20)
        wait_until(lambda: len(over_http.text) >= 20, "text over HTTP")
        os.kill(before.controller_pid, signal.SIGKILL)
        assert over_grpc.finish().token_ids == expected.token_ids
        assert over_http.finish() == over_grpc.text == expected.text
        wait_until(lambda: all_ready(deployment, restarts=0), "the controller's successor")
        after = deployment.status()
        assert after.controller_pid != before.controller_pid
        assert [gateway.pid for gateway in after.gateways] == [gateway.pid for gateway in before.gateways]

        with Client(served.addresses.grpc) as client:
            stream = client.stream_generate(PROMPT, max_tokens=250, temperature=0, ignore_eos=True)
            for _ in range(5):
                next(stream)
            wait_until(lambda: any(g.num_streams for g in deployment.status().gateways), "the stream's gateway")
            victim = next(gateway for gateway in deployment.status().gateways if gateway.num_streams)
            os.kill(victim.pid, signal.SIGKILL)
            assert list(stream.read_all().token_ids) == expected.token_ids

        def has_successor() -> bool:
            gateways = {gateway.name: gateway for gateway in deployment.status().gateways}
            return gateways[victim.name].is_connected and gateways[victim.name].restarts == 1

        wait_until(has_successor, "the gateway's successor")
        assert len(Reader(served, max_tokens=30).finish().token_ids) == 30
        pids = [gateway.pid for gateway in deployment.status().gateways]
        with pytest.raises(ConfigError, match=rf"{served.addresses.grpc}.*--grpc-port"):  # it would share their port
            _with_ports(GatewayConfig(grpc_port=int(served.addresses.grpc.rpartition(":")[2]), num_gateways=2))
    finally:
        deployment.shutdown()
    assert ray.util.list_named_actors() == []
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the gateways' end")


class HttpReader(threading.Thread):
    """A chat-like client over HTTP: the text of a streamed completion, read on a thread."""

    def __init__(self, served: Served, *, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._address = served.addresses.http
        self._body = {
            "model": "tiny", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True
        }  # fmt: skip
        self.text = ""
        self._lines: list[str] = []
        self.start()

    def run(self) -> None:
        request = urllib.request.Request(
            f"http://{self._address}/v1/completions",
            data=json.dumps(self._body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            for line in response:
                if line.startswith(b"data: "):
                    self._lines.append(line[6:].decode().strip())
                    if self._lines[-1] != "[DONE]":
                        self.text += json.loads(self._lines[-1])["choices"][0]["text"]

    def finish(self) -> str:
        self.join(60)
        assert self._lines[-1] == "[DONE]"
        return self.text
