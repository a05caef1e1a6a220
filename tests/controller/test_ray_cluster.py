"""The real thing on Ray: a controller, two workers with a tiny random Llama, and what happens when any of them is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import grpc
import pytest
import ray
from pilotfish.client import Client
from pilotfish.common.cluster_state import ClusterState, ReplicaState
from pilotfish.common.config import EngineConfig, FleetConfig, GatewayConfig, ModelConfig, ParallelConfig, ServeConfig
from pilotfish.common.errors import ConfigError, ModelLoadError, PilotfishError
from pilotfish.controller.deployment import Deployment, _with_ports, deploy, find
from pilotfish.controller.service import Addresses
from pilotfish.proto import inference_pb2 as pb
from pilotfish.proto import inference_pb2_grpc
from pilotfish.workers.actor import WorkerActor
from ray_nodes import RayNodes
from small_model import save_tiny_llama
from upcycled import upcycle

pytestmark = pytest.mark.cluster

PROMPT = "It was a dark and stormy night"


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    directory = tempfile.mkdtemp(prefix="pf-ray-", dir="/tmp")  # short: Ray puts sockets there
    options: dict[str, Any] = {
        "include_dashboard": False,
        "namespace": "pilotfish-test",
        "num_cpus": 2,
        "object_store_memory": 100 * 1024 * 1024,
        "log_to_driver": False,
        "_temp_dir": directory,
        "_node_ip_address": "127.0.0.1",
    }
    try:
        ray.init(**options)
    except Exception as error:  # noqa: BLE001 - Ray gives its own processes 30 s, which a machine that stood still can use up
        warnings.warn(f"Ray is started a second time: {error}", stacklevel=1)
        ray.init(**options)
    yield
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@dataclass
class Served:
    deployment: Deployment
    addresses: Addresses


def config(
    model_path: Path,
    *,
    num_replicas: int = 2,
    grpc_port: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    num_gateways: int = 0,
    **parallel: Any,
) -> ServeConfig:
    return ServeConfig(
        model=ModelConfig(model=str(model_path), served_name="tiny"),
        engine=EngineConfig(device=device, num_kv_blocks=512, num_threads=1, max_num_seqs=8),
        gateway=GatewayConfig(grpc_port=grpc_port, http_port=0, num_gateways=num_gateways),
        parallel=ParallelConfig(**parallel),
        fleet=FleetConfig(num_replicas=num_replicas),
    )


@pytest.fixture(scope="module")
def served(local_ray: None, model_path: Path) -> Iterator[Served]:
    deployment = deploy(config(model_path), model_path=str(model_path), worker_class=ray.remote(WorkerActor))
    try:
        yield Served(deployment, deployment.wait_ready(timeout_s=120))
    finally:
        deployment.shutdown()


class Reader(threading.Thread):
    """A client's stream, read to its end on a thread."""

    def __init__(self, served: Served, *, max_tokens: int, prompt: str = PROMPT) -> None:
        super().__init__(daemon=True)
        self._channel = grpc.insecure_channel(served.addresses.grpc)
        request = pb.GenerateRequest(text=prompt)
        request.sampling.max_tokens = max_tokens
        request.sampling.temperature = 0.0
        request.sampling.ignore_eos = True
        self._call = inference_pb2_grpc.InferenceStub(self._channel).Generate(request, timeout=60)
        self.token_ids: list[int] = []
        self.text = ""
        self.usage: pb.Usage | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            for event in self._call:
                kind = event.WhichOneof("event")
                if kind == "delta":
                    assert not event.delta.token_ids or event.delta.offset == len(self.token_ids)
                    self.token_ids.extend(event.delta.token_ids)
                    self.text += event.delta.text
                elif kind == "usage":
                    self.usage = event.usage
        except Exception as error:  # noqa: BLE001 - handed to the thread of the test
            self.error = error

    def wait_for(self, num_tokens: int) -> None:
        wait_until(lambda: len(self.token_ids) >= num_tokens or not self.is_alive(), "tokens")
        assert self.is_alive(), f"the stream ended early: {self.error}"

    def refused(self) -> bool:
        """Whether it ended because the server takes no more requests."""
        self.join(60)
        self._channel.close()
        return isinstance(self.error, grpc.RpcError) and self.error.code() is grpc.StatusCode.UNAVAILABLE

    def finish(self) -> Reader:
        self.join(60)
        self._channel.close()
        assert self.error is None
        assert self.usage is not None
        return self


def wait_until(condition: object, what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def all_ready(deployment: Deployment, *, restarts: int) -> bool:
    try:
        state: ClusterState = deployment.status()
    except PilotfishError:
        return False
    return state.num_restarts == restarts and all(r.state is ReplicaState.READY for r in state.replicas)


def test_requests_are_served_and_the_controller_has_no_torch(served: Served) -> None:
    reader = Reader(served, max_tokens=40).finish()
    assert len(reader.token_ids) == 40
    assert reader.usage.prompt_tokens == len(PROMPT)
    state = served.deployment.status()
    assert "libtorch" in Path(f"/proc/{state.replicas[0].info.pid}/maps").read_text()
    assert "libtorch" not in Path(f"/proc/{state.controller_pid}/maps").read_text()


def test_a_killed_worker_costs_no_token(served: Served) -> None:
    expected = Reader(served, max_tokens=1200).finish()
    reader = Reader(served, max_tokens=1200)
    reader.wait_for(50)
    state = served.deployment.status()
    victim = next(r for r in state.replicas if r.load.num_running)
    os.kill(victim.info.pid, signal.SIGKILL)
    reader.finish()
    assert reader.token_ids == expected.token_ids
    assert reader.text == expected.text
    assert reader.usage.completion_tokens == 1200
    assert reader.usage.replica != victim.name
    wait_until(lambda: all_ready(served.deployment, restarts=1), "the worker's successor")
    successor = next(r for r in served.deployment.status().replicas if r.name == victim.name)
    assert successor.info.epoch > victim.info.epoch


def test_a_killed_controller_comes_back_with_the_same_workers(served: Served) -> None:
    """A plain call ends with the process; the SDK's goes on at the next token."""
    before = served.deployment.status()
    greedy = {"max_tokens": 800, "temperature": 0, "ignore_eos": True}
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
    assert completion.usage.completion_tokens == 800
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


def test_ranks_of_a_replica_end_and_come_back_together(local_ray: None, model_path: Path) -> None:
    """Two ranks compute what one does; when the follower is killed, the replica starts anew and the stream goes on."""
    ranks = config(model_path, num_replicas=1, tensor_parallel=2)
    deployment = deploy(ranks, model_path=str(model_path), worker_class=ray.remote(WorkerActor))
    try:
        served = Served(deployment, deployment.wait_ready(timeout_s=120))
        expected = Reader(served, max_tokens=300).finish()
        reader = Reader(served, max_tokens=300)
        reader.wait_for(20)
        (name,) = [name for name in ray.util.list_named_actors() if name.endswith(".1")]
        ray.kill(ray.get_actor(name))
        reader.finish()
        assert reader.token_ids == expected.token_ids
        assert reader.text == expected.text
        wait_until(lambda: all_ready(deployment, restarts=1), "the replica's successor")
        assert len([name for name in ray.util.list_named_actors() if name.startswith("replica-0.")]) == 2
    finally:
        deployment.shutdown()
    assert ray.util.list_named_actors() == []
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())


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
            served = Served(cast(Deployment, None), Addresses(grpc=address))
            readers = [Reader(served, max_tokens=500) for _ in range(4)]
            for reader in readers:
                reader.wait_for(5)
            serve.send_signal(signal.SIGTERM)
            wait_until(lambda: Reader(served, max_tokens=1).refused(), "a refusal")
            tokens = [reader.finish().token_ids for reader in readers]
            assert [len(token_ids) for token_ids in tokens] == [500] * 4
            assert all(token_ids == tokens[0] for token_ids in tokens)
            assert serve.wait(60) == 0, serve.stderr.read()
        finally:
            serve.kill()
    assert [
        actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == "pilotfish-sigterm"
    ] == []


@pytest.mark.gpu2
def test_ranks_take_a_gpu_each(served: Served, model_path: Path) -> None:
    """NCCL refuses two ranks on one GPU. The text is that of one worker on a CPU."""
    ranks = config(model_path, num_replicas=1, tensor_parallel=2, device="cuda")
    deployment = deploy(ranks, model_path=str(model_path), worker_class=ray.remote(WorkerActor))
    try:
        on_gpus = Served(deployment, deployment.wait_ready(timeout_s=180))
        assert Reader(on_gpus, max_tokens=100).finish().token_ids == Reader(served, max_tokens=100).finish().token_ids
    finally:
        deployment.shutdown()


def test_data_ranks_end_and_come_back_together(local_ray: None, model_path: Path, tmp_path: Path) -> None:
    """Each data rank serves requests of its own; when one is killed, both start anew and the streams of both go on.

    The model is the tiny Llama with each MLP as several experts: it says what that says.
    """
    sparse = upcycle(model_path, tmp_path / "sparse", num_experts=3)
    ranks = config(sparse, num_replicas=1, data_parallel=2, expert_parallel=True)
    deployment = deploy(ranks, model_path=str(sparse), worker_class=ray.remote(WorkerActor))
    try:
        served = Served(deployment, deployment.wait_ready(timeout_s=120))
        prompts = [f"{number}: {PROMPT}" for number in range(4)]
        readers = [Reader(served, max_tokens=200, prompt=prompt) for prompt in prompts]
        for reader in readers:
            reader.wait_for(10)
        state = deployment.status()
        assert [(r.name, r.load.num_running) for r in state.replicas] == [("replica-0/0", 2), ("replica-0/1", 2)]
        os.kill(state.replicas[1].info.pid, signal.SIGKILL)
        for reader in readers:
            reader.finish()
        wait_until(lambda: all_ready(deployment, restarts=1), "the replica's successor")
        undisturbed = [Reader(served, max_tokens=200, prompt=prompt).finish() for prompt in prompts]
        assert [reader.token_ids for reader in readers] == [reader.token_ids for reader in undisturbed]
    finally:
        deployment.shutdown()
    assert ray.util.list_named_actors() == []


def test_a_rank_killed_while_experts_move_comes_back(local_ray: None, model_path: Path, tmp_path: Path) -> None:
    """Experts start anew from the checkpoint, in every slot; status tells of the moves before and after."""
    sparse = upcycle(model_path, tmp_path / "sparse", num_experts=4)
    ranks = config(
        sparse, num_replicas=1, tensor_parallel=2, expert_parallel=True, redundant_experts=2, rebalance_interval_steps=2
    )
    deployment = deploy(ranks, model_path=str(sparse), worker_class=ray.remote(WorkerActor))

    def have_moved() -> bool:
        balance = deployment.status().replicas[0].load.expert_balance
        return balance is not None and balance.num_moves > 0

    try:
        served = Served(deployment, deployment.wait_ready(timeout_s=120))
        expected = Reader(served, max_tokens=300).finish()
        assert have_moved()
        reader = Reader(served, max_tokens=300)
        reader.wait_for(20)
        (name,) = [name for name in ray.util.list_named_actors() if name.endswith(".1")]
        ray.kill(ray.get_actor(name))
        reader.finish()
        assert reader.token_ids == expected.token_ids
        wait_until(lambda: all_ready(deployment, restarts=1), "the replica's successor")
        assert have_moved()
    finally:
        deployment.shutdown()


def test_other_weights_are_served_without_a_break(local_ray: None, model_path: Path, tmp_path: Path) -> None:
    """A stream that has begun ends on the weights it began on; those that do not load change nothing."""
    other = save_tiny_llama(tmp_path / "other", seed=1)
    broken = shutil.copytree(other, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    one = config(model_path, num_replicas=1)
    deployment = deploy(one, model_path=str(model_path), worker_class=ray.remote(WorkerActor))

    def roll_out(path: Path, version: str) -> None:
        deployment.roll_out(str(path), model_path=str(path), version=version, timeout_s=120)

    try:
        served = Served(deployment, deployment.wait_ready(timeout_s=120))
        old = Reader(served, max_tokens=1900).finish().token_ids
        with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
            roll_out(broken, "broken")
        readers, has_changed = [], threading.Event()

        def ask_all_the_time() -> None:
            while not has_changed.is_set():
                readers.append(Reader(served, max_tokens=1900))
                readers[-1].wait_for(900)

        client = threading.Thread(target=ask_all_the_time)
        client.start()
        try:
            roll_out(other, "2")
        finally:
            has_changed.set()
            client.join(60)
        new = Reader(served, max_tokens=1900).finish().token_ids
        assert new != old
        (replica,) = deployment.status().replicas
        assert (replica.info.model_version, replica.info.model_path) == ("2", str(other))
        said = [reader.finish().token_ids for reader in readers]
        assert said[0] == old
        assert all(token_ids in (old, new) for token_ids in said)
    finally:
        deployment.shutdown()


def test_a_node_with_a_drain_notice_loses_its_replica_and_no_token(local_ray: None, model_path: Path) -> None:
    """Another replica starts on another node, the stream goes on there, and the node is free before it goes."""
    only_there = config(model_path, num_replicas=1, cpus_per_rank=3)  # this machine's own node has 2
    with RayNodes() as nodes:
        doomed = nodes.add(CPU=3)
        deployment = deploy(only_there, model_path=str(model_path), worker_class=ray.remote(WorkerActor))
        try:
            served = Served(deployment, deployment.wait_ready(timeout_s=120))
            nodes.add(CPU=3)
            nodes.notify(doomed, within_s=200)
            wait_until(lambda: "its node is about to go" in deployment.status().replicas[0].message, "the notice", 20)
            readers = []
            while all(r.state is not ReplicaState.READY for r in deployment.status().replicas):  # some stream runs all the time
                readers.append(Reader(served, max_tokens=1900))
                readers[-1].wait_for(900)
            homes = [reader.finish().usage.replica for reader in readers]
            assert homes[-1] == "replica-1", homes
            wait_until(lambda: [r.name for r in deployment.status().replicas] == ["replica-1"], "the replica to leave")
            assert all_ready(deployment, restarts=0)
            expected = Reader(served, max_tokens=1900).finish().token_ids
            assert all(reader.token_ids == expected for reader in readers)
            wait_until(lambda: not nodes.is_alive(doomed), "the node's end")  # Ray ends it once nothing is on it
        finally:
            deployment.shutdown()


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


def test_a_worker_that_cannot_load_says_why(local_ray: None, model_path: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_path, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    deployment = deploy(config(broken, num_replicas=1), model_path=str(broken), worker_class=ray.remote(WorkerActor))
    try:
        with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
            deployment.wait_ready(timeout_s=120)
    finally:
        deployment.shutdown()
    assert ray.util.list_named_actors() == []


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
        expected = Reader(served, max_tokens=800).finish()

        over_grpc, over_http = Reader(served, max_tokens=800), HttpReader(served, max_tokens=800)
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
            stream = client.stream_generate(PROMPT, max_tokens=800, temperature=0, ignore_eos=True)
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
