"""The router in a controller over real links: drift, held requests, places of data ranks, and the reasons for a choice."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from http_calls import get, post
from local_workers import Cluster, LocalLauncher, StartCluster
from pilotfish.client import AsyncClient, RoutingState
from pilotfish.common.errors import DeadlineExceeded
from pilotfish.workers.worker_service import ServerLimits
from reading import eventually, read


def routing(cluster: Cluster) -> dict[str, RoutingState]:
    return {replica.name: replica.routing for replica in cluster.service.status().replicas if replica.routing}


def is_settled(cluster: Cluster) -> bool:
    """Nothing is under way and the ledgers equal what the replicas say."""
    return all(
        (state.num_requests, state.num_held, state.queued_tokens, state.expected_blocks) == (0, 0, 0, 0)
        and (state.drift_requests, state.drift_tokens, state.drift_blocks) == (0, 0, 0)
        for state in routing(cluster).values()
    )


async def generate(cluster: Cluster, prompt: list[int], *, max_tokens: int = 8, **fields):
    return await cluster.service.start_request(prompt=prompt, sampling={"max_tokens": max_tokens}, **fields)


async def test_drift_is_bounded_in_flight_and_zero_when_idle(start_cluster: StartCluster) -> None:
    """Requests that end, that are aborted, and that run out of time."""
    cluster = await start_cluster(fleet={"num_replicas": 2}, step_s=0.001)
    shared = list(range(60))
    handles = [await generate(cluster, [*shared[: 4 * (i % 15)], 1, i], max_tokens=20 + i) for i in range(40)]
    late = await generate(cluster, [7, 7], max_tokens=4000, timeout_s=0.3)
    readers = [asyncio.create_task(read(handle)) for handle in handles[:30]]
    largest = RoutingState()
    for handle in handles[30:]:
        await asyncio.sleep(0.01)
        await cluster.service.abort(handle.request_id)
        largest = max([largest, *routing(cluster).values()], key=lambda state: abs(state.drift_tokens))
    await asyncio.gather(*readers)
    with pytest.raises(DeadlineExceeded):
        await read(late)
    assert abs(largest.drift_tokens) <= 2 * 512 + 60, "what is on its way, or two steps' tokens"
    await eventually(lambda: is_settled(cluster))


async def test_who_asks_changes_no_count(start_cluster: StartCluster) -> None:
    """Health checks, status, metrics and refused requests leave the ledger as it is, with work under way and without."""
    cluster = await start_cluster(fleet={"num_replicas": 2}, step_s=0.001)
    engines = [worker.engine for worker in cluster.launcher.launched]

    async def counts() -> tuple[dict[str, RoutingState], int, int]:
        return routing(cluster), cluster.service.status().num_running, len(cluster.controller._intake.streams.in_flight())

    async def ask(times: int) -> None:
        async with AsyncClient(cluster.service.addresses.grpc) as client:
            check = grpc.aio.insecure_channel(cluster.service.addresses.grpc)
            async with check:
                health = check.unary_unary("/grpc.health.v1.Health/Check")
                for _ in range(times):
                    await asyncio.gather(health(b""), client.status(), client.models(), client.explain_route("nobody"))
                    for path in ("/health", "/metrics", "/dashboard/state"):
                        await get(cluster, path)
                    assert (await post(cluster, "/v1/completions", {"prompt": ""}))[0] == 400

    handles = [await generate(cluster, [i, i, i], max_tokens=20) for i in range(4)]
    readers = [asyncio.create_task(read(handle)) for handle in handles]
    await eventually(lambda: all(handle._stream.sequences[0].output_token_ids for handle in handles))
    for engine in engines:
        engine.gate.clear()
    await asyncio.sleep(0.1)  # what was on its way is here
    before = await counts()
    await ask(10)
    assert await counts() == before
    for engine in engines:
        engine.gate.set()
    await asyncio.gather(*readers)
    await eventually(lambda: is_settled(cluster))
    await ask(5)
    assert is_settled(cluster)


async def test_drift_is_zero_again_when_a_replica_was_lost(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(fleet={"num_replicas": 2}, step_s=0.002)
    handles = [await generate(cluster, [i, i, i], max_tokens=60) for i in range(6)]
    readers = [asyncio.create_task(read(handle)) for handle in handles]
    await asyncio.sleep(0.05)
    await cluster.launcher.launched[0].kill()
    await asyncio.gather(*readers)
    await eventually(lambda: len(routing(cluster)) == 2 and is_settled(cluster))


async def test_data_ranks_have_ledgers_and_indexes_of_their_own(start_cluster: StartCluster) -> None:
    launcher = LocalLauncher(num_data_ranks=2, limits=ServerLimits(heartbeat_interval_s=0.05))
    cluster = await start_cluster(launcher=launcher)
    answers = [await read(await generate(cluster, [i] * 40)) for i in range(4)]
    assert {answer.usage.replica for answer in answers} == {"replica-0/0", "replica-0/1"}
    again = [await read(await generate(cluster, [i] * 40)) for i in range(4)]
    assert [answer.usage.replica for answer in again] == [answer.usage.replica for answer in answers]
    await eventually(lambda: is_settled(cluster))
    states = routing(cluster)
    for name, engine in zip(("replica-0/0", "replica-0/1"), launcher.launched[0].engines, strict=True):
        confirmed = cluster.controller._dispatcher.router.trie.confirmed_blocks(name)
        assert confirmed == {block.block_hash for block in engine.snapshot().scheduler.blocks}
        assert states[name].num_indexed_blocks == len(confirmed) > 0


async def test_a_request_is_held_for_the_replica_that_has_its_prefix(start_cluster: StartCluster) -> None:
    """Its batch is full for a moment: cheaper to wait for than to compute a long prefix elsewhere."""
    cluster = await start_cluster(fleet={"num_replicas": 2}, max_num_seqs=2, step_s=0.002, num_blocks=1024)
    prefix = [i % 90 for i in range(3000)]
    home = (await read(await generate(cluster, [*prefix, 1]))).usage.replica
    handles = [await generate(cluster, [*prefix, 2, i], max_tokens=10, request_id=f"q{i}") for i in range(6)]
    assert routing(cluster)[home].num_held > 0
    answers = await asyncio.gather(*map(read, handles))
    assert {answer.usage.replica for answer in answers} == {home}
    decisions = await cluster.service.explain_route("q5")
    assert [decision.is_held for decision in decisions] == [True] * (len(decisions) - 1) + [False]
    await eventually(lambda: is_settled(cluster))


async def test_a_held_request_goes_elsewhere_when_its_replica_stands_still(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(fleet={"num_replicas": 2}, max_num_seqs=2, step_s=0.002, num_blocks=1024)
    prefix = [i % 90 for i in range(3000)]
    home = (await read(await generate(cluster, [*prefix, 1]))).usage.replica
    engines = {f"replica-{n}": worker.engine for n, worker in enumerate(cluster.launcher.launched)}
    engines[home].gate.clear()
    handles = [await generate(cluster, [*prefix, 2, i], max_tokens=10) for i in range(4)]
    assert routing(cluster)[home].num_held == 1
    async with asyncio.timeout(60):
        answer = await read(handles[3])
    assert answer.usage.replica != home
    engines[home].gate.set()
    await asyncio.gather(*map(read, handles[:3]))
    await eventually(lambda: is_settled(cluster))


async def test_a_held_request_can_be_aborted_and_survives_its_replica(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(fleet={"num_replicas": 2}, max_num_seqs=2, step_s=0.002, num_blocks=1024)
    prefix = [i % 90 for i in range(3000)]
    home = (await read(await generate(cluster, [*prefix, 1]))).usage.replica
    workers = {f"replica-{n}": worker for n, worker in enumerate(cluster.launcher.launched)}
    workers[home].engine.gate.clear()
    handles = [await generate(cluster, [*prefix, 2, i], max_tokens=10) for i in range(5)]
    assert routing(cluster)[home].num_held == 2
    handles[3].cancel()
    assert routing(cluster)[home].num_held == 1
    await workers[home].kill()
    await asyncio.gather(*(read(handle) for handle in (*handles[:3], handles[4])))
    await eventually(lambda: is_settled(cluster))


async def test_the_sdk_is_told_every_choice_with_its_scores(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(fleet={"num_replicas": 3})
    async with AsyncClient(cluster.service.addresses.grpc) as client:
        await client.generate([5] * 40, max_tokens=3, request_id="first")
        await client.generate([5] * 40, max_tokens=3, n=2, request_id="second")
        (first,) = await client.explain_route("first")
        second = await client.explain_route("second")
        assert await client.explain_route("nobody") == ()
    assert first.num_tokens == 40
    assert [score.replica for score in first.scores] == ["replica-0", "replica-1", "replica-2"]
    assert {first.why_not(score) for score in first.scores} == {"", "costs the same; it was chosen more recently"}
    assert len(second) == 2
    for decision in second:  # a prompt so short may go elsewhere, where that costs the same
        assert {score.replica: score.matched_tokens for score in decision.scores if score.matched_tokens}[first.replica] == 32
        assert all(decision.why_not(score) for score in decision.scores if score.replica != decision.replica)
