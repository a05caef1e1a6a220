"""Tenants through both doors: keys, limits, shares; real server and scheduler, arithmetic in place of a model."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from local_workers import Cluster, StartCluster
from pilotfish.client import AsyncClient
from pilotfish.client.options import RetryPolicy
from pilotfish.common.api_keys import hash_line, make_key
from pilotfish.common.config import TenantConfig
from pilotfish.common.errors import DeadlineExceeded, Overloaded, PermissionDenied, Unauthenticated
from pilotfish.common.tenants import Tenant
from pilotfish.controller.tenants import Tenants
from reading import read

KEYS = {name: make_key(name.encode().ljust(8), name.encode().ljust(32)) for name in ("acme", "zoo", "stranger")}
HASHES = {name: (hash_line(key),) for name, key in KEYS.items()}
ONCE = RetryPolicy(max_attempts=1)


def two(**acme: Any) -> dict[str, TenantConfig]:
    return {"acme": TenantConfig(keys=HASHES["acme"], **acme), "zoo": TenantConfig(keys=HASHES["zoo"])}


def client(cluster: Cluster, name: str | None, retry: RetryPolicy = ONCE) -> AsyncClient:
    return AsyncClient(cluster.service.addresses.grpc, api_key=None if name is None else KEYS[name], retry=retry)


def tenant(cluster: Cluster, name: str) -> Tenant:
    return cluster.service.tenants.authenticate(f"Bearer {KEYS[name]}")


def test_without_keys_everybody_is_anonymous() -> None:
    tenants = Tenants({})
    assert tenants.authenticate(None) == tenants.authenticate("Bearer whatever") == Tenant("anonymous")
    limited = Tenants({"anonymous": TenantConfig(weight=2.0, max_requests=1)})
    assert limited.authenticate(None) == Tenant("anonymous", 2.0)
    limited.limits(limited.authenticate(None)).enter(0)
    with pytest.raises(Overloaded):
        limited.limits(limited.authenticate(None)).enter(0)


@pytest.mark.parametrize(
    "value", [None, "", "Bearer", "Bearer ", f"Basic {KEYS['acme']}", KEYS["acme"], f"Bearer {KEYS['stranger']}"]
)
def test_a_call_without_a_valid_key_is_refused(value: str | None) -> None:
    tenants = Tenants(two())
    with pytest.raises(Unauthenticated, match="Bearer KEY"):
        tenants.authenticate(value)
    assert tenants.authenticate(f"bearer {KEYS['zoo']}").name == "zoo"


async def test_the_sdk_brings_its_key_and_none_is_logged(
    start_cluster: StartCluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    cluster = await start_cluster(tenants=two())
    for name in (None, "stranger"):
        async with client(cluster, name) as refused:
            calls = (refused.generate([1, 2]), refused.chat("hi"), refused.tokenize("a"), refused.models(), refused.status())
            for call in (*calls, refused.abort("x")):
                with pytest.raises(Unauthenticated, match="API key"):
                    await call
    async with client(cluster, "acme") as allowed:
        assert len((await allowed.generate([5, 6], max_tokens=3)).token_ids) == 3
        with pytest.raises(PermissionDenied, match="operator = true"):
            await allowed.status()
    monkeypatch.setenv("PILOTFISH_API_KEY", KEYS["zoo"])
    async with AsyncClient(cluster.service.addresses.grpc, retry=ONCE) as by_variable:
        assert await by_variable.models()
    engine = cluster.launcher.launched[0].engine
    assert engine.submitted[0].tenant == Tenant("acme"), "the worker is told whose it is"
    assert not any(secret in caplog.text for key in KEYS.values() for secret in (key, key[20:]))
    assert not any(key[20:] in repr(cluster.service._config) for key in KEYS.values())


async def test_a_tenant_cannot_end_anothers_request(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(tenants=two(), step_s=0.005)
    handle = await cluster.service.start_request(
        prompt=[1], sampling={"max_tokens": 50}, request_id="mine", tenant=tenant(cluster, "acme")
    )
    async with client(cluster, "zoo") as other:
        assert not await other.abort("mine")
    await read(handle)


async def test_requests_in_flight_and_tokens_a_minute_are_limited(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(tenants=two(max_requests=2, max_tokens_per_minute=100))
    engine = cluster.launcher.launched[0].engine
    engine.gate.clear()
    acme, zoo = tenant(cluster, "acme"), tenant(cluster, "zoo")

    async def start(whose: Tenant, max_tokens: int = 10) -> Any:
        return await cluster.service.start_request(prompt=[1, 2, 3], sampling={"max_tokens": max_tokens}, tenant=whose)

    handles = [await start(acme) for _ in range(2)]
    with pytest.raises(Overloaded, match="acme has 2 requests in flight") as refused:
        await start(acme)
    assert refused.value.retry_after_s is not None
    handles.append(await start(zoo))
    engine.gate.set()
    await asyncio.gather(*(read(handle) for handle in handles))
    await read(await start(acme, max_tokens=60))
    with pytest.raises(Overloaded, match="100 tokens a minute") as refused:
        await start(acme, max_tokens=60)
    assert 10 < refused.value.retry_after_s < 40, "63 are wanted, 11 are left, 100 come a minute"
    limits = cluster.service.tenants.limits(acme)
    assert limits.num_in_flight == 0


async def test_a_modest_tenant_is_served_beside_a_greedy_one(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(tenants=two(), max_num_seqs=1, step_s=0.001)
    engine = cluster.launcher.launched[0].engine
    engine.gate.clear()
    acme, zoo = tenant(cluster, "acme"), tenant(cluster, "zoo")

    async def start(name: str, whose: Tenant, priority: int) -> Any:
        return await cluster.service.start_request(
            prompt=[1, 2, 3], sampling={"max_tokens": 4}, request_id=name, tenant=whose, priority=priority
        )

    handles = [await start(f"a{number}", acme, 100) for number in range(12)]
    handles += [await start(f"z{number}", zoo, 0) for number in range(4)]
    engine.gate.set()
    await asyncio.gather(*(read(handle) for handle in handles))
    order = [request.request_id[0] for request in engine.submitted]
    assert order[2:10].count("z") == 4, "they take turns"


async def test_a_queued_request_past_its_deadline_is_answered_at_once(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(max_num_seqs=1)
    engine = cluster.launcher.launched[0].engine
    engine.gate.clear()
    running = [await cluster.service.start_request(prompt=[1], sampling={"max_tokens": 2}) for _ in range(2)]
    async with client(cluster, None) as caller:
        start = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded):
            await caller.generate([1, 2], timeout_s=0.3)
        assert asyncio.get_running_loop().time() - start < 2.0
    handle = await cluster.service.start_request(prompt=[1], sampling={"max_tokens": 2}, timeout_s=0.2)
    with pytest.raises(DeadlineExceeded):
        await read(handle)
    assert cluster.service.status().num_queued == 0
    engine.gate.set()
    await asyncio.gather(*(read(handle) for handle in running))


async def test_the_sdk_comes_back_when_told_and_finds_its_place(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(max_num_seqs=1, gateway={"max_queued_requests": 2}, step_s=0.01)
    async with client(cluster, None, RetryPolicy(max_attempts=4)) as caller:
        answers = await asyncio.gather(*(caller.generate([n, 1], max_tokens=5) for n in range(7)))
    assert all(len(answer.token_ids) == 5 for answer in answers)


@pytest.mark.parametrize("whole_server", [False, True])
async def test_an_isolated_tenants_prompts_meet_only_its_own(start_cluster: StartCluster, whole_server: bool) -> None:
    cluster = await start_cluster(
        tenants=two(isolate_cache=not whole_server), gateway={"isolate_cache": whole_server}, fleet={"num_replicas": 2}
    )
    for number, name in enumerate(("acme", "zoo", "acme", "zoo")):
        whose, request_id = tenant(cluster, name), f"r{number}"
        handle = await cluster.service.start_request(
            prompt=[*range(96), 1, 2], sampling={"max_tokens": 2}, request_id=request_id, tenant=whose
        )
        usage = (await read(handle)).usage
        (decision,) = await cluster.service.explain_route(request_id, tenant=whose)
        found = usage.cached_tokens, max(score.matched_tokens for score in decision.scores)
        assert found == ((0, 0) if number < 2 else (96, 96)), "of its own second prompt, and only of that"


async def test_tenants_share_the_prefix_cache_where_none_asks_otherwise(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(tenants=two())
    cached = []
    for name in ("acme", "zoo"):
        handle = await cluster.service.start_request(
            prompt=[*range(96), 1, 2], sampling={"max_tokens": 2}, tenant=tenant(cluster, name)
        )
        cached.append((await read(handle)).usage.cached_tokens)
    assert cached == [0, 96]
