"""Who may ask for what, with API keys on: every gRPC method and HTTP route, as the servers themselves list them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from http_calls import raw
from local_workers import Cluster, StartCluster
from pilotfish.client import AsyncClient
from pilotfish.common.api_keys import hash_line, make_key
from pilotfish.common.config import TenantConfig
from starlette.routing import Route

KEYS = {name: make_key(name.encode().ljust(8), name.encode().ljust(32)) for name in ("acme", "zoo", "watcher")}
ALL, TENANTS, OPERATORS = "all", "tenants", "operators"
# A new method or route belongs here: who may call it.
GRPC_METHODS = {
    "/pilotfish.v1.Inference/Generate": TENANTS,
    "/pilotfish.v1.Inference/Chat": TENANTS,
    "/pilotfish.v1.Inference/Resume": TENANTS,
    "/pilotfish.v1.Inference/Abort": TENANTS,
    "/pilotfish.v1.Inference/Tokenize": TENANTS,
    "/pilotfish.v1.Inference/ListModels": TENANTS,
    "/pilotfish.v1.Inference/ClusterStatus": OPERATORS,
    "/pilotfish.v1.Inference/ExplainRoute": TENANTS,
    "/grpc.health.v1.Health/Check": ALL,
    "/grpc.health.v1.Health/Watch": ALL,
    "/grpc.health.v1.Health/List": ALL,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": TENANTS,
}
HTTP_ROUTES = {
    "POST /v1/chat/completions": TENANTS,
    "POST /v1/completions": TENANTS,
    "GET /v1/models": TENANTS,
    "GET /v1/models/tiny": TENANTS,
    "GET /health": ALL,
    "GET /metrics": OPERATORS,
    "GET /dashboard": ALL,
    "GET /dashboard/state": OPERATORS,
}


def tenants() -> dict[str, TenantConfig]:
    return {name: TenantConfig(keys=(hash_line(key),), operator=name == "watcher") for name, key in KEYS.items()}


@pytest.fixture
async def cluster(start_cluster: StartCluster) -> Cluster:
    return await start_cluster(tenants=tenants())


@pytest.fixture
async def channel(cluster: Cluster) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(cluster.service.addresses.grpc) as channel:
        yield channel


def bearer(name: str | None) -> tuple[tuple[str, str], ...]:
    return () if name is None else (("authorization", f"Bearer {KEYS.get(name, name)}"),)


async def grpc_code(channel: grpc.aio.Channel, method: str, name: str | None) -> tuple[grpc.StatusCode, str]:
    """How a call without a request ends: whoever is let in hears that."""
    call = channel.stream_stream(method)(metadata=bearer(name), timeout=0.2 if method.endswith("/Watch") else 10)
    try:
        await call.done_writing()
        async for _ in call:
            pass
    except grpc.aio.AioRpcError:
        pass
    return await call.code(), str(await call.details())


async def listed_methods(channel: grpc.aio.Channel) -> set[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=bearer("acme"), timeout=10
    )
    names = [service.name for service in (await call.read()).list_services_response.service]
    pool = descriptor_pool.Default()
    return {f"/{name}/{method.name}" for name in names for method in pool.FindServiceByName(name).methods}


async def test_every_grpc_method_needs_its_key(cluster: Cluster, channel: grpc.aio.Channel) -> None:
    assert await listed_methods(channel) == set(GRPC_METHODS)
    for method, open_to in GRPC_METHODS.items():
        for name in (None, "", "pf-0-x", "acme", "watcher"):
            code, details = await grpc_code(channel, method, name)
            may = open_to == ALL or name == "watcher" or (open_to == TENANTS and name == "acme")
            if may:
                assert code not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED), (method, name)
            elif name == "acme":
                assert (code, "operator = true" in details) == (grpc.StatusCode.PERMISSION_DENIED, True), method
            else:
                assert (code, "API key" in details) == (grpc.StatusCode.UNAUTHENTICATED, True), (method, name)


@pytest.mark.parametrize(
    "method", ["/pilotfish.v1.Inference/Added", "/pilotfish.v1.Added/Read", "/", "//", "/grpc.health.v1.Other/X"]
)
async def test_what_nobody_listed_needs_a_key_too(channel: grpc.aio.Channel, method: str) -> None:
    assert (await grpc_code(channel, method, None))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert (await grpc_code(channel, method, "acme"))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_every_http_route_needs_its_key(cluster: Cluster) -> None:
    http = cluster.controller._entrance.doors._http
    assert http is not None
    routes = {
        f"{method} {route.path.replace('{name:path}', 'tiny')}"
        for route in http.app.routes
        for method in (route.methods or ()) - {"HEAD"}
        if isinstance(route, Route)
    }
    assert (routes, len(http.app.routes)) == (set(HTTP_ROUTES), len(HTTP_ROUTES))
    for line, open_to in HTTP_ROUTES.items():
        for name in (None, "", "pf-0-x", "acme", "watcher"):
            key = "" if name is None else f"Authorization: Bearer {KEYS.get(name, name)}\r\n"
            status, _, body = await raw(cluster, f"{line} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n{key}\r\n{{}}".encode())
            may = open_to == ALL or name == "watcher" or (open_to == TENANTS and name == "acme")
            expected = (200, 400) if may else (403,) if name == "acme" else (401,)
            assert status in expected, (line, name, body)
            if not may:
                assert body["error"]["code"] == ("permission_denied" if name == "acme" else "unauthenticated")


async def test_health_says_whether_and_nothing_else(cluster: Cluster, channel: grpc.aio.Channel) -> None:
    check = channel.unary_unary("/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString)
    assert (await check(b"", timeout=5)).SerializeToString() == b"\x08\x01"
    _, _, body = await raw(cluster, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert body == {"status": "ok"}


async def test_a_tenant_is_told_of_its_own_requests_routes_only(cluster: Cluster) -> None:
    address = cluster.service.addresses.grpc
    async with AsyncClient(address, api_key=KEYS["acme"]) as acme:
        await acme.generate([1, 2, 3], max_tokens=2, request_id="mine")
        (decision,) = await acme.explain_route("mine")
        assert decision.tenant == "acme"
    async with AsyncClient(address, api_key=KEYS["zoo"]) as zoo:
        assert await zoo.explain_route("mine") == ()
        await zoo.generate([4, 5], max_tokens=2, request_id="mine")  # the id is free again
        assert [decision.num_tokens for decision in await zoo.explain_route("mine")] == [2]
    async with AsyncClient(address, api_key=KEYS["watcher"]) as watcher:
        assert [decision.tenant for decision in await watcher.explain_route("mine")] == ["acme", "zoo"]
        assert (await watcher.status()).model == "tiny"


async def test_without_keys_all_is_open(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.service.addresses.grpc) as client:
        await client.generate([1, 2], max_tokens=2, request_id="mine")
        assert len(await client.explain_route("mine")) == 1
        assert (await client.status()).num_requests == 1
