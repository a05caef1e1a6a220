"""Workers killed, stalled or silent, connections cut, controllers replaced: no token is lost and none repeated."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from fake_engine import expected_tokens
from grpc_health.v1 import health_pb2, health_pb2_grpc
from http_calls import get
from local_workers import Cluster, LocalLauncher, LocalWorker, StartCluster
from pilotfish.common.cluster_state import ReplicaState
from pilotfish.common.errors import ConfigError, InternalError, InvalidRequest, ModelLoadError, PoisonousRequest, Unavailable
from pilotfish.controller import fleet as fleet_module
from pilotfish.controller.authority import Authority
from pilotfish.controller.service import RequestHandle
from pilotfish.controller.worker_process import Misplaced, NoRoom, WorkerDied, worker_name
from pilotfish.workers.worker_service import ServerLimits
from reading import Answer, eventually, read, read_until
from tcp_proxy import TcpProxy

PROMPT = [5, 6, 7, 8]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_RESTART_PAUSE_S", (0.0, 0.05))


async def generate(cluster: Cluster, *, max_tokens: int = 150, **options: Any) -> RequestHandle:
    return await cluster.service.start_request(prompt=PROMPT, sampling={"max_tokens": max_tokens}, **options)


def check(answer: Answer, num_tokens: int = 150) -> None:
    for choice in answer.choices.values():
        assert choice.token_ids == expected_tokens(PROMPT, num_tokens)


def worker_of(cluster: Cluster, handle: RequestHandle) -> LocalWorker:
    """The worker that runs a request's first choice."""
    places = [place for replica in cluster.controller._fleet._replicas for place in replica.places]
    place = next(place for place in places if place.name == handle._stream.sequences[0].replica)
    return next(w for w in cluster.launcher.launched if place.serving in w.places)


@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_a_stream_goes_on_when_its_worker_is_killed(start_cluster: StartCluster, num_replicas: int) -> None:
    cluster = await start_cluster(step_s=0.002, fleet={"num_replicas": num_replicas})
    handle = await cluster.service.start_request(prompt=PROMPT, sampling={"max_tokens": 150, "n": 2, "logprobs": 0})
    answer = Answer()
    await read_until(handle, answer, lambda a: len(a.choices.get(0, Answer).token_ids) >= 20 if 0 in a.choices else False)
    victim = worker_of(cluster, handle)
    known = len(handle._stream.sequences[0].output_token_ids)
    await victim.kill()
    await read(handle, into=answer)
    check(answer)
    assert answer.usage.completion_tokens == 300
    others = [w for w in cluster.launcher.launched if w is not victim]
    replayed = [request for worker in others for request in worker.engine.submitted]
    assert all(len(request.output_token_ids) >= known for request in replayed if request.request_id.partition("#")[2] == "0")
    await eventually(lambda: cluster.service.status().num_restarts == 1)
    await eventually(lambda: all(r.state is ReplicaState.READY for r in cluster.service.status().replicas))
    check(await read(await generate(cluster)))


async def test_only_losses_without_a_step_between_them_count_against_a_replica(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(fleet={"max_restarts": 1})
    for num_restarts in range(4):
        check(await read(await generate(cluster, max_tokens=20)), 20)
        await cluster.launcher.launched[-1].kill()
        await eventually(lambda n=num_restarts: cluster.service.status().num_restarts == n + 1)
        await eventually(lambda: cluster.service.status().replicas[0].state is ReplicaState.READY)


async def test_a_request_that_is_there_when_replica_after_replica_dies_ends(start_cluster: StartCluster) -> None:
    """It gets on between the first deaths, which clears it, and does not between the last two."""
    cluster = await start_cluster(step_s=0.002, fleet={"max_attempts": 2, "max_restarts": 10})
    handle = await generate(cluster, max_tokens=4000)
    answer, launched = Answer(), cluster.launcher.launched
    for num in (1, 2, 3):
        await read_until(handle, answer, lambda a, n=num: a.num_deltas >= 15 * n)
        await launched[-1].kill()
        await eventually(lambda n=num: len(launched) == n + 1)
    launched[-1].engine.gate.clear()
    await eventually(lambda: len(launched[-1].engine.submitted) == 1)
    await launched[-1].kill()
    with pytest.raises(PoisonousRequest, match="running on at least 2 replicas in a row when they died"):
        await read(handle, into=answer)


async def test_replicas_whose_machines_go_are_no_evidence_against_a_request(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.03, fleet={"max_attempts": 2, "max_restarts": 10})
    handle, launched = await generate(cluster, max_tokens=20), cluster.launcher.launched
    for num in (1, 2, 3):  # with too few tokens in between to clear it
        await eventually(lambda: len(launched[-1].engine.submitted) == 1)
        launched[-1].machine_is_lost = True
        await launched[-1].kill()
        await eventually(lambda n=num: len(launched) == n + 1)
    check(await read(handle), 20)


async def test_a_request_that_no_worker_takes_ends(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(refuse=InvalidRequest("token 300 is outside the vocabulary"))
    with pytest.raises(InternalError, match="refused by workers 3 times, the last time because token 300"):
        await read(await generate(cluster))


async def test_a_stalled_step_costs_the_worker_and_not_the_request(
    start_cluster: StartCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Who is stuck, since which step and at what is told."""
    cluster = await start_cluster(step_s=0.002, stall_timeout_s=0.3)
    handle = await generate(cluster)
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 5)
    cluster.launcher.launched[0].engine.gate.clear()
    await read(handle, into=answer)
    check(answer)
    assert len(cluster.launcher.launched) == 2
    assert re.search(r"replica-0: a step has been running for [\d.]+ s, after step \d+ \(phase step;", caplog.text)


async def test_health_says_not_serving_while_the_engine_is_stuck(start_cluster: StartCluster) -> None:
    """The worker's port answers all the time; its successor is slow to come."""
    launcher = HeldLauncher(engine_options={"step_s": 0.002})
    cluster = await start_cluster(launcher=launcher, stall_timeout_s=0.3)
    async with grpc.aio.insecure_channel(cluster.service.addresses.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        launcher.may_launch.clear()
        launcher.launched[0].engine.gate.clear()
        reading = asyncio.create_task(read(await generate(cluster)))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await get(cluster, "/health"))[0] == 503
        launcher.may_launch.set()
        check(await reading)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await get(cluster, "/health"))[0] == 200


@dataclass
class HeldLauncher(LocalLauncher):
    may_launch: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_launch.set()

    async def launch(self, replica: str, *, epoch: int, **options: Any) -> LocalWorker:
        await self.may_launch.wait()
        return await super().launch(replica, epoch=epoch, **options)


async def test_a_controller_that_stood_still_loses_no_worker(start_cluster: StartCluster) -> None:
    """Heartbeats that wait to be read are no silence."""
    cluster = await start_cluster(step_s=0.002, fleet={"heartbeat_timeout_s": 0.5})
    handle = await generate(cluster)
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 5)
    sum(range(25_000_000))  # one call: no other thread runs meanwhile
    await read(handle, into=answer)
    check(answer)
    assert len(cluster.launcher.launched) == 1


async def test_a_lost_step_costs_the_worker_and_not_the_request(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.002)
    handle = await generate(cluster)
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 5)
    cluster.launcher.launched[0].engine._step_id += 1  # as if the server had dropped a message
    await read(handle, into=answer)
    check(answer)
    assert len(cluster.launcher.launched) == 2


async def test_a_failed_engine_costs_the_worker_and_not_the_request(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.002)
    handle = await generate(cluster)
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 5)
    cluster.launcher.launched[0].engine.fail()
    await read(handle, into=answer)
    check(answer)
    assert len(cluster.launcher.launched) == 2


async def test_data_ranks_are_places_of_one_replica(start_cluster: StartCluster) -> None:
    """Requests go to both. When the engine of one fails, both are started anew and every stream goes on, at its second try."""
    launcher = LocalLauncher(engine_options={"step_s": 0.002}, num_data_ranks=2)
    cluster = await start_cluster(launcher=launcher, fleet={"max_attempts": 2})
    statuses = cluster.service.status().replicas
    assert [(r.name, r.state) for r in statuses] == [(f"replica-0/{rank}", ReplicaState.READY) for rank in range(2)]
    assert len({r.address for r in statuses}) == 2
    handles = [await generate(cluster) for _ in range(4)]
    answers = [Answer() for _ in handles]
    for handle, answer in zip(handles, answers, strict=True):
        await read_until(handle, answer, lambda a: a.num_deltas >= 5)
    (worker,) = launcher.launched
    assert [len(engine.submitted) for engine in worker.engines] == [2, 2]
    worker.engines[1].fail()
    for handle, answer in zip(handles, answers, strict=True):
        await read(handle, into=answer)
        check(answer)
    assert cluster.service.status().num_restarts == 1
    assert [len(engine.submitted) for engine in launcher.launched[1].engines] == [2, 2]


class ProxyLauncher(LocalLauncher):
    """Puts a TcpProxy between the controller and each worker."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.proxies: list[TcpProxy] = []

    async def launch(self, replica: str, *, epoch: int, **options: Any) -> LocalWorker:
        worker = await super().launch(replica, epoch=epoch, **options)
        proxy = TcpProxy(worker.address)
        worker.address = await proxy.start()
        self.proxies.append(proxy)
        return worker


@pytest.fixture
async def proxied() -> AsyncIterator[ProxyLauncher]:
    launcher = ProxyLauncher(engine_options={"step_s": 0.002})
    yield launcher
    for proxy in launcher.proxies:
        await proxy.stop()


async def test_a_cut_connection_is_joined_where_it_broke(start_cluster: StartCluster, proxied: ProxyLauncher) -> None:
    cluster = await start_cluster(launcher=proxied)
    handle = await generate(cluster, max_tokens=600)
    answer = Answer()
    for _ in range(4):
        seen = answer.num_deltas
        await read_until(handle, answer, lambda a, seen=seen: a.num_deltas >= seen + 10)
        proxied.proxies[0].cut()
    await read(handle, into=answer)
    check(answer, 600)
    assert proxied.proxies[0].num_connections >= 5
    assert len(proxied.launched) == 1
    assert len(proxied.launched[0].engine.submitted) == 1  # it ran on, it was not run again


async def test_submits_and_aborts_of_a_broken_connection_are_said_again(
    start_cluster: StartCluster, proxied: ProxyLauncher
) -> None:
    cluster = await start_cluster(launcher=proxied)
    running = await generate(cluster, max_tokens=4000)
    await read_until(running, Answer(), lambda a: a.num_deltas >= 2)
    proxied.proxies[0].silent = True  # what is sent now is lost
    running.cancel()
    submitted = await generate(cluster)
    await asyncio.sleep(0.05)
    proxied.proxies[0].cut()
    proxied.proxies[0].silent = False
    check(await read(submitted))
    await eventually(lambda: cluster.service.status().num_running == 0)
    assert len(proxied.launched[0].engine.aborted) == 1


async def test_a_silent_connection_is_opened_anew(start_cluster: StartCluster, proxied: ProxyLauncher) -> None:
    cluster = await start_cluster(launcher=proxied, fleet={"heartbeat_timeout_s": 2.0})
    handle = await generate(cluster)
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 3)
    proxied.proxies[0].silent = True
    before = proxied.proxies[0].num_connections
    await eventually(lambda: proxied.proxies[0].num_connections > before)
    proxied.proxies[0].silent = False
    await read(handle, into=answer)
    check(answer)
    assert len(proxied.launched) == 1


async def test_a_silent_worker_is_replaced(start_cluster: StartCluster, proxied: ProxyLauncher) -> None:
    cluster = await start_cluster(launcher=proxied, fleet={"heartbeat_timeout_s": 0.6})
    handle = await generate(cluster)
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 3)
    proxied.proxies[0].silent = True
    await read(handle, into=answer)
    check(answer)
    assert len(proxied.launched) == 2


async def test_a_worker_that_is_no_part_of_the_cluster_is_not_used(
    start_cluster: StartCluster, proxied: ProxyLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    """Something else answers at its address: nothing is said to it, the log says why, and the worker is replaced."""
    cluster = await start_cluster(launcher=proxied, fleet={"heartbeat_timeout_s": 0.6})
    (first,) = proxied.launched
    stranger = LocalWorker(
        epoch=first.info.epoch,
        identities=[Authority.create().issue(worker_name("replica-0", epoch=first.info.epoch))],
        limits=proxied.limits,
        engine_options={},
    )
    with caplog.at_level("INFO", logger="pilotfish"):
        proxied.proxies[0].redirect(stranger.address)
        check(await read(await generate(cluster)))
    assert "no part of this cluster" in caplog.text
    assert stranger.engine.submitted == []
    assert len(proxied.launched) == 2
    await stranger.kill()


async def test_what_a_worker_gives_up_runs_elsewhere(start_cluster: StartCluster, proxied: ProxyLauncher) -> None:
    proxied.limits = ServerLimits(heartbeat_interval_s=0.05, away_timeout_s=0.1)
    cluster = await start_cluster(launcher=proxied)
    handle = await generate(cluster, max_tokens=400)
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 3)
    engine = proxied.launched[0].engine
    proxied.proxies[0].silent = True
    proxied.proxies[0].cut()
    await eventually(lambda: len(engine.aborted) == 1)
    proxied.proxies[0].silent = False
    proxied.proxies[0].cut()
    await read(handle, into=answer)
    check(answer, 400)
    assert len(engine.submitted) == 2
    assert len(engine.submitted[1].output_token_ids) > 3


async def test_an_engine_that_paused_goes_on_once_the_controller_has_followed(start_cluster: StartCluster) -> None:
    limits = ServerLimits(heartbeat_interval_s=0.05, pause_bytes=2000, resume_bytes=1000)
    cluster = await start_cluster(launcher=LocalLauncher(limits=limits), stall_timeout_s=0.3)
    answer = await read(await generate(cluster, max_tokens=60))
    check(answer, 60)
    (replica,) = cluster.controller.status().replicas
    assert replica.paused_s > 0
    assert len(cluster.launcher.launched) == 1


async def test_a_gap_in_the_cache_events_is_closed_by_a_snapshot(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    dispatcher = cluster.controller._dispatcher
    trie = dispatcher.router.trie
    trie._replicas["replica-0"].next_event_id -= 5  # as if five events had been lost
    long = await cluster.service.start_request(prompt=list(range(64)), sampling={"max_tokens": 100})
    answer = await read(long)
    assert answer.choices[0].token_ids == expected_tokens(list(range(64)), 100)
    blocks = cluster.launcher.launched[0].engine.scheduler.snapshot().blocks
    await eventually(lambda: not trie.needs_snapshot("replica-0") and trie.num_blocks("replica-0") == len(blocks))


async def test_a_new_controller_takes_over_living_workers(start_cluster: StartCluster) -> None:
    launcher = LocalLauncher(engine_options={"step_s": 0.002})
    first = await start_cluster(launcher=launcher)
    prompt = list(range(64))
    await read(await first.service.start_request(prompt=prompt, sampling={"max_tokens": 1}))
    await generate(first, max_tokens=4000)
    await eventually(lambda: len(launcher.launched[0].engine.submitted) == 2)
    worker = launcher.launched[0]
    await crash(first, worker)

    successor = LocalLauncher(living={"replica-0": worker}, authority=launcher.authority)
    second = await start_cluster(launcher=successor)
    assert successor.launched == []
    await eventually(lambda: len(worker.engine.aborted) == 1)  # its client went with the first controller
    again = await read(await second.service.start_request(prompt=prompt, sampling={"max_tokens": 5}))
    assert again.choices[0].token_ids == expected_tokens(prompt, 5)
    trie = second.controller._dispatcher.router.trie
    assert trie.num_blocks("replica-0") >= 4
    await eventually(lambda: worker.engine.scheduler.load().num_used_blocks == 0)
    await worker.kill()


async def crash(cluster: Cluster, worker: LocalWorker) -> None:
    """As if the controller's process had died: its connections break and it ends no worker."""

    async def nothing() -> None:
        pass

    worker.end = nothing  # type: ignore[method-assign]
    tasks = cluster.controller._fleet._tasks
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    cluster.controller._fleet._replicas.clear()


async def test_a_worker_that_cannot_start_says_why_to_who_waits(start_cluster: StartCluster) -> None:
    launcher = LocalLauncher(failures=[ModelLoadError("tensor model.norm.weight is missing")])
    cluster = await start_cluster(launcher=launcher, wait=False)
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight"):
        await cluster.controller.wait_ready()
    with pytest.raises(Unavailable, match=r"no replica is left: tensor model\.norm"):
        await generate(cluster)
    (replica,) = cluster.service.status().replicas
    assert (replica.state, replica.restarts) == (ReplicaState.FAILED, 0)


async def test_a_worker_that_dies_at_its_first_start_is_reported(start_cluster: StartCluster) -> None:
    launcher = LocalLauncher(failures=[WorkerDied("the process was killed (out of memory?)")])
    cluster = await start_cluster(launcher=launcher, wait=False)
    with pytest.raises(InternalError, match="out of memory"):
        await cluster.controller.wait_ready()


async def test_a_defect_of_the_launcher_is_told_to_who_waits(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(launcher=LocalLauncher(failures=[TypeError("a defect")]), wait=False)
    with pytest.raises(InternalError, match="TypeError: a defect"):
        await cluster.controller.wait_ready()


async def test_a_worker_whose_place_is_bad_is_placed_again(start_cluster: StartCluster) -> None:
    launcher = LocalLauncher(failures=[Misplaced("nodes a and b cannot reach each other")] * 2)
    cluster = await start_cluster(launcher=launcher)
    check(await read(await generate(cluster)))
    assert cluster.service.status().num_restarts == 0


async def test_where_no_place_is_good_the_bad_ones_are_named(start_cluster: StartCluster) -> None:
    launcher = LocalLauncher(failures=[Misplaced("nodes a and b cannot reach each other")] * 3)
    cluster = await start_cluster(launcher=launcher, wait=False)
    with pytest.raises(ConfigError, match="nodes a and b cannot reach each other, and nowhere else"):
        await cluster.controller.wait_ready()


async def test_before_the_first_worker_serves_requests_are_refused(start_cluster: StartCluster) -> None:
    class SlowLauncher(LocalLauncher):
        async def launch(self, replica: str, *, epoch: int, **options: Any) -> LocalWorker:
            await asyncio.Event().wait()
            raise AssertionError

    cluster = await start_cluster(launcher=SlowLauncher(), wait=False)
    with pytest.raises(Unavailable, match="being loaded"):
        await generate(cluster)
    assert cluster.service.models() == ()


async def test_a_start_that_takes_too_long_is_given_up(start_cluster: StartCluster) -> None:
    class SlowLauncher(LocalLauncher):
        async def launch(self, replica: str, *, epoch: int, **options: Any) -> LocalWorker:
            await asyncio.Event().wait()
            raise AssertionError

    cluster = await start_cluster(launcher=SlowLauncher(), wait=False, fleet={"start_timeout_s": 0.1})
    with pytest.raises(InternalError, match=r"not ready after 0\.1 s"):
        await cluster.controller.wait_ready()


async def test_a_fleet_that_cannot_recover_tells_who_waits(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.01, fleet={"max_restarts": 2})
    handle = await generate(cluster, max_tokens=4000)
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 2)
    cluster.launcher.failures = [WorkerDied("no memory")] * 5
    await cluster.launcher.launched[0].kill()
    with pytest.raises(Unavailable, match="no memory"):
        await read(handle, into=answer)
    assert len(cluster.launcher.failures) == 3  # two restarts were tried


async def test_a_stream_waits_while_there_is_no_room_for_its_replica(start_cluster: StartCluster) -> None:
    """A lost node may come back, however often Ray has said that it is not there yet."""
    cluster = await start_cluster(fleet={"max_restarts": 1})
    handle = await generate(cluster)
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 2)
    cluster.launcher.failures = [NoRoom("2 ranks need a GPU each")] * 5
    await cluster.launcher.launched[0].kill()
    check(await read(handle, into=answer))


async def test_no_room_at_the_first_start_is_told_to_who_waits(start_cluster: StartCluster) -> None:
    launcher = LocalLauncher(failures=[NoRoom("2 ranks need a GPU each")])
    cluster = await start_cluster(launcher=launcher, wait=False)
    with pytest.raises(ConfigError, match="a GPU each"):
        await cluster.controller.wait_ready()


async def test_a_burst_with_one_prefix_meets_on_one_replica(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(fleet={"num_replicas": 2})
    shared = list(range(90))
    warm = await cluster.service.start_request(prompt=[*shared, 1], sampling={"max_tokens": 2})
    home = (await read(warm)).usage.replica
    answers = [
        await read(await cluster.service.start_request(prompt=[*shared, i], sampling={"max_tokens": 2})) for i in range(5)
    ]
    assert {a.usage.replica for a in answers} == {home}
    assert all(a.usage.cached_tokens == 80 for a in answers)


async def test_load_is_spread_over_replicas(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(fleet={"num_replicas": 2}, step_s=0.005)
    handles = [await cluster.service.start_request(prompt=[i, 50 + i, 9], sampling={"max_tokens": 30}) for i in range(8)]
    answers = await asyncio.gather(*(read(handle) for handle in handles))
    assert {a.usage.replica for a in answers} == {"replica-0", "replica-1"}
