"""A fleet whose number of replicas changes under load: no token is lost and none repeated, and the books stay right."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from fake_engine import expected_tokens
from http_calls import get
from local_workers import Cluster, LocalLauncher, LocalWorker, StartCluster
from pilotfish.common.cluster_state import ReplicaState
from pilotfish.common.errors import ModelLoadError, Unavailable
from pilotfish.controller import autoscaler as autoscaler_module
from pilotfish.controller import fleet as fleet_module
from pilotfish.controller.fleet import Fleet
from pilotfish.controller.service import RequestHandle
from pilotfish.controller.worker_process import Misplaced, NoRoom
from pilotfish.scheduler.autoscaling import ScalingConfig
from reading import Answer, eventually, read, read_until

PROMPT = [5, 6, 7, 8]
SIZES = {"min_replicas": 1, "max_replicas": 4}


async def generate(cluster: Cluster, *, max_tokens: int = 150, prompt: list[int] = PROMPT, **options: Any) -> RequestHandle:
    return await cluster.service.start_request(prompt=prompt, sampling={"max_tokens": max_tokens}, **options)


async def begun(cluster: Cluster, *, max_tokens: int) -> tuple[RequestHandle, Answer]:
    """A stream that has said something."""
    handle, answer = await generate(cluster, max_tokens=max_tokens), Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 3)
    return handle, answer


def check(answer: Answer, num_tokens: int, prompt: list[int] = PROMPT) -> None:
    assert answer.choices[0].token_ids == expected_tokens(prompt, num_tokens)


def fleet_of(cluster: Cluster) -> Fleet:
    return cluster.controller._fleet


def states(cluster: Cluster) -> dict[str, ReplicaState]:
    return {replica.name: replica.state for replica in cluster.service.status().replicas}


def all_ready(cluster: Cluster, num_replicas: int) -> bool:
    return list(states(cluster).values()) == [ReplicaState.READY] * num_replicas


def worker_of(cluster: Cluster, name: str) -> LocalWorker:
    address = next(replica.address for replica in cluster.service.status().replicas if replica.name == name)
    return next(worker for worker in cluster.launcher.launched if worker.address == address)


def check_books(cluster: Cluster) -> None:
    """Once nothing runs, the router counts nothing and knows the blocks that the caches have."""
    router = cluster.controller._dispatcher.router
    for status in cluster.service.status().replicas:
        assert status.routing is not None
        assert (status.routing.num_requests, status.routing.num_held) == (0, 0)
        assert (status.routing.drift_requests, status.routing.drift_tokens, status.routing.drift_blocks) == (0, 0, 0)
        blocks = worker_of(cluster, status.name).engine.scheduler.snapshot().blocks
        assert router.trie.confirmed_blocks(status.name) == {block.block_hash for block in blocks}
    assert set(router.ledger._accounts) == set(states(cluster))


async def test_streams_end_where_they_are_before_their_replica_goes(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.002, fleet={"num_replicas": 2, **SIZES})
    streams = [await begun(cluster, max_tokens=200) for _ in range(4)]
    fleet_of(cluster).resize(1, "a test")
    (leaving,) = (name for name, state in states(cluster).items() if state is ReplicaState.DRAINING)
    worker = worker_of(cluster, leaving)
    num_submitted = len(worker.engine.submitted)
    assert num_submitted == 2
    late = await generate(cluster, max_tokens=20)
    for handle, answer in streams:
        check(await read(handle, into=answer), 200)
    check(await read(late), 20)
    assert sum(answer.usage.replica == leaving for _, answer in streams) == 2
    assert len(worker.engine.submitted) == num_submitted  # nothing new went there
    assert worker.engine.aborted == []
    await eventually(lambda: all_ready(cluster, 1) and worker._dead.is_set())
    check_books(cluster)


async def test_streams_that_take_too_long_go_on_elsewhere(start_cluster: StartCluster) -> None:
    """It is no failed try of theirs: `max_attempts` 1 allows it."""
    cluster = await start_cluster(step_s=0.002, fleet={"num_replicas": 2, "max_attempts": 1, "drain_timeout_s": 0.05, **SIZES})
    streams = [await begun(cluster, max_tokens=400) for _ in range(4)]
    fleet_of(cluster).resize(1, "a test")
    (leaving,) = (name for name, state in states(cluster).items() if state is ReplicaState.DRAINING)
    worker = worker_of(cluster, leaving)
    for handle, answer in streams:
        check(await read(handle, into=answer), 400)
        assert answer.usage.replica != leaving
    await eventually(lambda: all_ready(cluster, 1) and worker._dead.is_set())
    (other,) = (w for w in cluster.launcher.launched if w is not worker)
    moved = [request for request in other.engine.submitted if request.output_token_ids]
    assert len(moved) == 2
    check_books(cluster)
    assert b"pilotfish_recoveries_total 0.0" in (await get(cluster, "/metrics"))[2]


async def test_a_name_is_given_again_under_a_later_epoch(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(fleet={"num_replicas": 2, **SIZES})
    prompt = list(range(64))
    for _ in range(4):
        check(await read(await generate(cluster, max_tokens=5, prompt=prompt)), 5, prompt)
    before = {replica.name: replica.info.epoch for replica in cluster.service.status().replicas if replica.info}
    fleet_of(cluster).resize(1, "a test")
    (left,) = (name for name, state in states(cluster).items() if state is ReplicaState.READY)
    fleet_of(cluster).resize(2, "a test")  # while the other still drains: its name is in use
    await eventually(lambda: all_ready(cluster, 2))
    assert set(states(cluster)) == {left, "replica-2"}
    fleet_of(cluster).resize(3, "a test")
    await eventually(lambda: all_ready(cluster, 3))
    assert set(states(cluster)) == {"replica-0", "replica-1", "replica-2"}
    again = next(r for r in cluster.service.status().replicas if r.name in before and r.name != left)
    assert again.info is not None
    assert again.info.epoch > before[again.name]
    assert again.routing is not None
    assert again.routing.num_indexed_blocks == 0
    for _ in range(3):
        check(await read(await generate(cluster, max_tokens=5, prompt=prompt)), 5, prompt)
    await eventually(lambda: cluster.service.status().num_running == 0)
    await asyncio.sleep(0.1)  # the heartbeat with the last load
    check_books(cluster)


async def test_what_is_held_for_a_replica_that_goes_is_not_forgotten(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(max_num_seqs=1, fleet={"num_replicas": 2, **SIZES})
    prompt = [token % 97 for token in range(3000)]
    home = (await read(await generate(cluster, max_tokens=1, prompt=prompt))).usage.replica
    for worker in cluster.launcher.launched:
        worker.engine.gate.clear()
    handles = [await generate(cluster, max_tokens=4, prompt=prompt) for _ in range(4)]
    dispatcher, fleet = cluster.controller._dispatcher, fleet_of(cluster)
    assert {held.replica for held in dispatcher.router._held.values()} == {home}
    fleet.let_go(next(replica for replica in fleet.staying if replica.name == home), "a test", within_s=10.0)
    assert not dispatcher._held
    for worker in cluster.launcher.launched:
        worker.engine.gate.set()
    answers = await asyncio.gather(*map(read, handles))
    for answer in answers:
        check(answer, 4, prompt)
    assert len({answer.usage.replica for answer in answers}) == 2
    await eventually(lambda: all_ready(cluster, 1))


async def test_a_replica_whose_worker_has_just_gone_can_go(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is still called ready, but the dispatcher has forgotten it already."""
    cluster = await start_cluster(step_s=0.002, fleet={"num_replicas": 2, **SIZES})
    streams = [await begun(cluster, max_tokens=200) for _ in range(2)]
    worker, fleet = worker_of(cluster, "replica-0"), fleet_of(cluster)
    has_gone, may_be_heard_of = asyncio.Event(), asyncio.Event()

    async def end() -> None:
        has_gone.set()
        await may_be_heard_of.wait()

    monkeypatch.setattr(worker, "end", end)
    await worker.kill()
    async with asyncio.timeout(10):
        await has_gone.wait()
    replica = next(replica for replica in fleet.staying if replica.name == "replica-0")
    assert replica.state is ReplicaState.READY
    fleet.let_go(replica, "a test", within_s=10.0)
    may_be_heard_of.set()
    for handle, answer in streams:
        check(await read(handle, into=answer), 200)
    await eventually(lambda: states(cluster) == {"replica-1": ReplicaState.READY})
    assert len(cluster.launcher.launched) == 2  # and no successor was started
    check_books(cluster)


async def test_a_replica_that_starts_can_go(start_cluster: StartCluster) -> None:
    class SlowLauncher(LocalLauncher):
        num_cancelled = 0

        async def launch(self, replica: str, *, epoch: int, **options: Any) -> LocalWorker:
            if self.launched:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.num_cancelled += 1
                    raise
            return await super().launch(replica, epoch=epoch, **options)

    launcher = SlowLauncher()
    cluster = await start_cluster(launcher=launcher, fleet=SIZES)
    fleet = fleet_of(cluster)
    fleet.resize(3, "a test")
    await asyncio.sleep(0)  # one launch has begun, of the third not even that
    fleet.resize(4, "a test")
    fleet.resize(1, "a test")
    await eventually(lambda: states(cluster) == {"replica-0": ReplicaState.READY})
    assert launcher.num_cancelled == 2
    check(await read(await generate(cluster, max_tokens=20)), 20)


async def test_a_successor_takes_over_as_many_as_there_are(start_cluster: StartCluster) -> None:
    launcher = LocalLauncher()
    living = {
        name: LocalWorker(
            epoch=7, identities=[launcher.authority.issue(f"{name}.7.0")], limits=launcher.limits, engine_options={}
        )
        for name in ("replica-10", "replica-2", "replica-4")
    }
    launcher.living = dict(living)
    cluster = await start_cluster(launcher=launcher, fleet={"min_replicas": 1, "max_replicas": 2})
    assert launcher.launched == []
    assert states(cluster) == {"replica-2": ReplicaState.READY, "replica-4": ReplicaState.READY}
    assert living["replica-10"]._dead.is_set()


async def test_sizes_that_change_all_the_time_lose_nothing(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load, with workers that are killed in between."""
    monkeypatch.setattr(fleet_module, "_RESTART_PAUSE_S", (0.0, 0.05))
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    cluster = await start_cluster(
        step_s=0.002, max_num_seqs=4, fleet={"max_attempts": 50, "max_restarts": 50, "drain_timeout_s": 0.1, **SIZES}
    )
    prompts = [[rng.randrange(97) for _ in range(rng.choice((4, 40)))] for _ in range(24)]
    readers = [asyncio.create_task(read(await generate(cluster, max_tokens=150, prompt=prompt))) for prompt in prompts]
    for _ in range(12):
        fleet_of(cluster).resize(rng.randint(1, 4), "a test")
        await asyncio.sleep(rng.uniform(0.0, 0.12))
        if rng.random() < 0.3:
            ready = [name for name, state in states(cluster).items() if state is ReplicaState.READY]
            if ready:
                await worker_of(cluster, rng.choice(ready)).kill()
    for prompt, answer in zip(prompts, await asyncio.gather(*readers), strict=True):
        check(answer, 150, prompt)
    fleet_of(cluster).resize(2, "a test")
    await eventually(lambda: all_ready(cluster, 2))
    await eventually(lambda: all(r.load.num_used_blocks == 0 for r in cluster.service.status().replicas))
    check_books(cluster)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of the policy are tenths here."""
    quick = partial(ScalingConfig, up_ticks=100, pause_ticks=50)
    monkeypatch.setattr(autoscaler_module, "ScalingConfig", quick)
    monkeypatch.setattr(autoscaler_module, "_INTERVAL_S", 0.02)


async def test_the_fleet_follows_its_load_to_zero_and_back(start_cluster: StartCluster, hurried: None) -> None:
    cluster = await start_cluster(
        step_s=0.004,
        max_num_seqs=2,
        fleet={
            "min_replicas": 0,
            "max_replicas": 3,
            "target_wait_s": 0.05,
            "shrink_after_s": 0.4,
            "idle_timeout_s": 0.2,
            "drain_timeout_s": 0.05,
        },
    )
    service = cluster.service
    handles = [await generate(cluster, max_tokens=100) for _ in range(16)]
    readers = [asyncio.create_task(read(handle)) for handle in handles]
    await eventually(lambda: all_ready(cluster, 3))
    up = service.status().scaling
    assert (up.min_replicas, up.max_replicas, up.num_wanted) == (0, 3, 3)
    assert "requests wait" in up.reason
    for answer in await asyncio.gather(*readers):
        check(answer, 100)
    assert len({answer.usage.replica for answer in await asyncio.gather(*readers)}) == 3
    await eventually(lambda: states(cluster) == {})
    down = service.status().scaling
    assert (down.num_wanted, down.num_up, down.num_down) == (0, up.num_up, 3)
    assert "no request for 0.2" in down.reason
    assert all(worker._dead.is_set() for worker in cluster.launcher.launched)
    assert fleet_of(cluster).is_serving  # whoever comes now waits, and is not refused
    assert (await get(cluster, "/health"))[0] == 200  # or a balancer would send nobody
    assert [card.name for card in service.models()] == ["tiny"]
    num_launched = len(cluster.launcher.launched)
    check(await read(await generate(cluster, max_tokens=20)), 20)
    assert len(cluster.launcher.launched) == num_launched + 1
    text = (await get(cluster, "/metrics"))[2]
    assert b"pilotfish_wanted_replicas 1.0" in text
    assert b'pilotfish_scaling_decisions_total{direction="down"} 3.0' in text


async def test_who_waits_for_a_replica_that_cannot_start_is_told(
    start_cluster: StartCluster, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again when that has been shown for a while."""
    monkeypatch.setattr(autoscaler_module, "_FAILURE_PAUSE_S", 0.5)
    cluster = await start_cluster(fleet={"min_replicas": 0, "max_replicas": 2, "idle_timeout_s": 0.1})
    await eventually(lambda: states(cluster) == {})
    cluster.launcher.failures = [ModelLoadError("the disk is gone")]
    with pytest.raises(Unavailable, match="the disk is gone"):
        await read(await generate(cluster, max_tokens=20))
    assert states(cluster) == {"replica-0": ReplicaState.FAILED}
    with pytest.raises(Unavailable, match="no replica is left: the disk is gone"):
        await generate(cluster)
    await eventually(lambda: states(cluster) == {})
    check(await read(await generate(cluster, max_tokens=20)), 20)


async def test_a_failed_addition_costs_the_others_nothing(
    start_cluster: StartCluster, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscaler_module, "_FAILURE_PAUSE_S", 0.3)
    cluster = await start_cluster(
        step_s=0.002, max_num_seqs=2, fleet={"min_replicas": 1, "max_replicas": 2, "target_wait_s": 0.05}
    )
    cluster.launcher.failures = [NoRoom("a rank needs a GPU")]
    readers = [asyncio.create_task(read(await generate(cluster, max_tokens=120))) for _ in range(12)]
    await eventually(lambda: states(cluster).get("replica-1") is ReplicaState.FAILED)
    assert "needs a GPU" in cluster.service.status().replicas[1].message
    await eventually(lambda: all_ready(cluster, 2))
    for reader in readers:
        check(await reader, 120)


async def test_batch_work_waits_for_its_places(start_cluster: StartCluster) -> None:
    """The dispatcher's account of what there is to do, which the policy sees."""
    cluster = await start_cluster(max_num_seqs=1)
    cluster.launcher.launched[0].engine.gate.clear()
    for priority in (0, -1, -1, 0, 5):
        await generate(cluster, priority=priority)
    demand = cluster.controller._dispatcher.demand()
    assert (demand.num_running, demand.num_queued, demand.num_batch) == (1, 2, 2)
    before = demand.wait_ms
    await asyncio.sleep(0.05)
    assert cluster.controller._dispatcher.demand().wait_ms > before  # it grows while the oldest waits
    cluster.launcher.launched[0].engine.gate.set()


async def test_a_node_that_is_about_to_go_loses_its_replica_and_no_token(start_cluster: StartCluster) -> None:
    """Its streams go on on others at once, and another replica starts; the fleet keeps its number."""
    cluster = await start_cluster(step_s=0.002, fleet={"num_replicas": 2, "max_attempts": 1})
    streams = [await begun(cluster, max_tokens=300) for _ in range(4)]
    doomed = worker_of(cluster, "replica-0")
    doomed.notice.set_result(30.0)
    for handle, answer in streams:
        check(await read(handle, into=answer), 300)
        assert answer.usage.replica != "replica-0"
    await eventually(lambda: states(cluster) == {"replica-1": ReplicaState.READY, "replica-2": ReplicaState.READY})
    assert doomed._dead.is_set()
    assert cluster.service.status().num_restarts == 0


async def test_the_only_replica_of_a_node_that_goes_serves_until_another_does(start_cluster: StartCluster) -> None:
    class WaitingLauncher(LocalLauncher):
        go = asyncio.Event()

        async def launch(self, replica: str, *, epoch: int, on_wait: Callable[[str], None], **options: Any) -> LocalWorker:
            if self.launched:
                on_wait("waits for a node: it needs a GPU")
                await self.go.wait()
                on_wait("")
            return await super().launch(replica, epoch=epoch, **options)

    launcher = WaitingLauncher(engine_options={"step_s": 0.002})
    cluster = await start_cluster(launcher=launcher)
    early, answer = await begun(cluster, max_tokens=600)
    worker_of(cluster, "replica-0").notice.set_result(60.0)
    await eventually(lambda: len(states(cluster)) == 2)
    status = {replica.name: (replica.state, replica.message) for replica in cluster.service.status().replicas}
    assert status == {
        "replica-0": (ReplicaState.DRAINING, "its node is about to go in 60 s"),
        "replica-1": (ReplicaState.STARTING, "waits for a node: it needs a GPU"),
    }
    check(await read(await generate(cluster, max_tokens=20)), 20)  # nobody waits for the other one
    launcher.go.set()
    check(await read(early, into=answer), 600)
    assert answer.usage.replica == "replica-1"
    await eventually(lambda: states(cluster) == {"replica-1": ReplicaState.READY})


async def test_a_notice_hurries_a_replica_that_drains(start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_NOTICE_MARGIN_S", 0.05)
    cluster = await start_cluster(step_s=0.002, fleet={"num_replicas": 2, "drain_timeout_s": 600.0, **SIZES})
    streams = [await begun(cluster, max_tokens=400) for _ in range(2)]
    fleet_of(cluster).resize(1, "a test")
    (leaving,) = (name for name, state in states(cluster).items() if state is ReplicaState.DRAINING)
    doomed = worker_of(cluster, leaving)
    doomed.engine.gate.clear()  # nothing ends there any more
    doomed.notice.set_result(0.1)
    for handle, answer in streams:
        check(await read(handle, into=answer), 400)
        assert answer.usage.replica != leaving
    doomed.engine.gate.set()
    assert len(cluster.launcher.launched) == 2  # nothing is started for one that was to go


async def test_a_node_that_goes_may_leave_no_room_for_a_while(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a loss without notice, the fleet comes back to its number when there is room."""
    monkeypatch.setattr(fleet_module, "_RESTART_PAUSE_S", (0.05,))
    launcher = LocalLauncher(engine_options={"step_s": 0.002})
    cluster = await start_cluster(launcher=launcher)
    handle, answer = await begun(cluster, max_tokens=300)
    launcher.failures = [NoRoom("a rank needs a GPU")] * 3
    worker_of(cluster, "replica-0").notice.set_result(60.0)
    await eventually(lambda: not launcher.failures)
    assert states(cluster)["replica-1"] is not ReplicaState.FAILED
    check(await read(handle, into=answer), 300)
    await eventually(lambda: states(cluster) == {"replica-1": ReplicaState.READY})


async def test_where_no_other_comes_in_time_streams_wait_for_it(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_NOTICE_MARGIN_S", 0.05)
    launcher = LocalLauncher(engine_options={"step_s": 0.002})
    cluster = await start_cluster(launcher=launcher)
    handle, answer = await begun(cluster, max_tokens=600)
    launcher.failures = [Misplaced("nodes a and b cannot reach each other")] * 2
    doomed = worker_of(cluster, "replica-0")
    original = launcher.launch

    async def slow_launch(*args: Any, **options: Any) -> LocalWorker:
        await doomed._dead.wait()
        return await original(*args, **options)

    monkeypatch.setattr(launcher, "launch", slow_launch)
    doomed.notice.set_result(0.2)
    check(await read(handle, into=answer), 600)
    assert states(cluster) == {"replica-1": ReplicaState.READY}
