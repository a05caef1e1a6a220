"""Replicas on Ray: their ranks end and come back together, their nodes go, and their weights change."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import ray
from pilotfish.common.cluster_state import ReplicaState
from pilotfish.common.errors import ModelLoadError
from pilotfish.controller.deployment import deploy
from pilotfish.controller.ray_placement import is_any_gone, place
from pilotfish.workers.actor import WorkerActor
from processes import stopped
from ray_nodes import RayNodes
from ray_serving import PROMPT, Reader, Served, all_ready, config, wait_until
from small_model import save_tiny_llama
from upcycled import upcycle

pytestmark = pytest.mark.cluster


def test_ranks_of_a_replica_end_and_come_back_together(local_ray: None, model_path: Path) -> None:
    """Two ranks compute what one does; when the follower is killed, the replica starts anew and the stream goes on."""
    ranks = config(model_path, num_replicas=1, tensor_parallel=2)
    deployment = deploy(ranks, model_path=str(model_path), worker_class=ray.remote(WorkerActor))
    try:
        served = Served(deployment, deployment.wait_ready(timeout_s=120))
        expected = Reader(served, max_tokens=80).finish()
        reader = Reader(served, max_tokens=80)
        reader.wait_for(20)
        (name,) = [name for name in ray.util.list_named_actors() if name.endswith(".1")]
        ray.kill(ray.get_actor(name))
        named = re.compile(r"rank 1 on [\d.]+: its process ended: .*; the last step was [1-9]\d* \(phase \w+\)")
        wait_until(lambda: named.search(deployment.status().replicas[0].message), "the dead rank's name", timeout_s=20)
        reader.finish()
        assert reader.token_ids == expected.token_ids
        assert reader.text == expected.text
        wait_until(lambda: all_ready(deployment, restarts=1), "the replica's successor")
        assert len([name for name in ray.util.list_named_actors() if name.startswith("replica-0.")]) == 2
    finally:
        deployment.shutdown()
    assert ray.util.list_named_actors() == []
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())


def test_data_ranks_end_and_come_back_together(local_ray: None, model_path: Path, tmp_path: Path) -> None:
    """Each data rank serves requests of its own; when one is killed, both start anew and the streams of both go on. Experts
    move all the time: they start from the checkpoint again, and status tells of the moves before and after.

    The model is the tiny Llama with each MLP as several experts: it says what that says.
    """
    sparse = upcycle(model_path, tmp_path / "sparse", num_experts=4)
    experts = {"expert_parallel": True, "redundant_experts": 2, "rebalance_interval_steps": 2}
    ranks = config(sparse, num_replicas=1, data_parallel=2, **experts)
    deployment = deploy(ranks, model_path=str(sparse), worker_class=ray.remote(WorkerActor))

    def have_moved() -> bool:
        balance = deployment.status().replicas[0].load.expert_balance
        return balance is not None and balance.num_moves > 0

    try:
        served = Served(deployment, deployment.wait_ready(timeout_s=120))
        prompts = [f"{number}: {PROMPT}" for number in range(4)]
        readers = [Reader(served, max_tokens=60, prompt=prompt) for prompt in prompts]
        for reader in readers:
            reader.wait_for(10)
        wait_until(have_moved, "moves")
        state = deployment.status()
        assert [(r.name, r.load.num_running) for r in state.replicas] == [("replica-0/0", 2), ("replica-0/1", 2)]
        os.kill(state.replicas[1].info.pid, signal.SIGKILL)
        for reader in readers:
            reader.finish()
        wait_until(lambda: all_ready(deployment, restarts=1), "the replica's successor")
        undisturbed = [Reader(served, max_tokens=60, prompt=prompt).finish() for prompt in prompts]
        assert [reader.token_ids for reader in readers] == [reader.token_ids for reader in undisturbed]
        assert have_moved()
    finally:
        deployment.shutdown()
    assert ray.util.list_named_actors() == []


def test_other_weights_are_served_and_a_stream_keeps_those_it_has(local_ray: None, model_path: Path, tmp_path: Path) -> None:
    """What does not load changes nothing. A replica whose placement group is removed comes back with the weights it had, and
    its stream goes on."""
    other = save_tiny_llama(tmp_path / "other", seed=1)
    broken = shutil.copytree(other, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    one = config(model_path, num_replicas=1, heartbeat_timeout_s=100, cpus_per_rank=1)
    deployment = deploy(one, model_path=str(model_path), worker_class=ray.remote(WorkerActor))

    def roll_out(path: Path, version: str) -> None:
        deployment.roll_out(str(path), model_path=str(path), version=version, timeout_s=120)

    try:
        served = Served(deployment, deployment.wait_ready(timeout_s=120))
        with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
            roll_out(broken, "broken")
        old = Reader(served, max_tokens=200).finish().token_ids
        reader = Reader(served, max_tokens=200)
        reader.wait_for(20)
        rollout = threading.Thread(target=roll_out, args=(other, "2"), daemon=True)
        with stopped(deployment.status().replicas[0].info.pid):
            rollout.start()
            states = [ReplicaState.DRAINING, ReplicaState.READY]
            wait_until(lambda: [r.state for r in deployment.status().replicas] == states, "a replica with them")
            new = Reader(served, max_tokens=200).finish().token_ids
        assert new != old
        assert reader.finish().token_ids == old
        rollout.join(60)
        (replica,) = deployment.status().replicas
        assert (replica.info.model_version, replica.info.model_path) == ("2", str(other))

        reader = Reader(served, max_tokens=200)
        reader.wait_for(20)
        (group,) = [group["name"] for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
        ray.util.remove_placement_group(ray.util.get_placement_group(group))
        assert reader.finish().token_ids == new
        wait_until(lambda: all_ready(deployment, restarts=1), "a replica in another group")
        (replica,) = deployment.status().replicas
        assert replica.info.model_version == "2"
    finally:
        deployment.shutdown()


def test_a_node_with_a_drain_notice_loses_its_replica_and_no_token(local_ray: None, model_path: Path) -> None:
    """Another replica starts on another node, the stream goes on there, and the node is free before it goes."""
    only_there = config(model_path, num_replicas=1, heartbeat_timeout_s=100, cpus_per_rank=3)  # this machine's own node has 2
    with RayNodes() as nodes:
        doomed = nodes.add(CPU=3)
        deployment = deploy(only_there, model_path=str(model_path), worker_class=ray.remote(WorkerActor))
        try:
            served = Served(deployment, deployment.wait_ready(timeout_s=120))
            nodes.add(CPU=3)
            expected = Reader(served, max_tokens=200).finish().token_ids
            reader = Reader(served, max_tokens=200)
            reader.wait_for(20)
            assert not asyncio.run(is_any_gone([doomed, ray.get_runtime_context().get_node_id()]))
            with stopped(deployment.status().replicas[0].info.pid):
                nodes.notify(doomed, within_s=200)
                wait_until(lambda: "its node is about to go" in deployment.status().replicas[0].message, "the notice", 20)
                assert reader.finish().token_ids == expected
            assert reader.usage.replica == "replica-1"
            wait_until(lambda: [r.name for r in deployment.status().replicas] == ["replica-1"], "the replica to leave")
            assert all_ready(deployment, restarts=0)
            wait_until(lambda: not nodes.is_alive(doomed), "the node's end")  # Ray ends it once nothing is on it
            assert asyncio.run(is_any_gone([doomed]))
        finally:
            deployment.shutdown()


def test_tensor_ranks_of_a_data_rank_stay_together(local_ray: None) -> None:
    """On two nodes with room for three ranks each. Tensor ranks alone go where they are asked to."""
    bundle = {"CPU": 1.0, "room": 1.0}

    async def node_of_each_rank(*, data_ranks: int, num_ranks: int, placement: str) -> list[str]:
        where = {"num_ranks": num_ranks, "data_ranks": data_ranks, "placement": placement}
        group = await place(f"group-{placement}-{data_ranks}", bundle, timeout_s=30, on_wait=print, **where)
        nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
        ray.util.remove_placement_group(group)
        return [nodes[rank * len(nodes) // num_ranks] for rank in range(num_ranks)]

    with RayNodes() as nodes:
        both = {nodes.add(CPU=3, room=3), nodes.add(CPU=3, room=3)}
        for placement in ("spread", "pack"):
            first, second, third, fourth = asyncio.run(node_of_each_rank(data_ranks=2, num_ranks=4, placement=placement))
            assert (first, third) == (second, fourth)
            assert {first, third} == both
        assert set(asyncio.run(node_of_each_rank(data_ranks=1, num_ranks=2, placement="spread"))) == both
