"""Clients that mean no good, at the doors of a whole controller: clear errors, in finite time, and nothing of them is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from http_calls import post
from local_workers import Cluster, StartCluster
from pilotfish.client import AsyncClient
from pilotfish.common.errors import InvalidRequest
from pilotfish.controller.openai_schema import ChatBody, parse_body
from pilotfish.proto import inference_pb2 as pb
from reading import eventually

TIMEOUT_S = 0.5  # client_timeout_s of these servers
BODY = b'{"prompt":"x","max_tokens":2}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
LENGTH = f"Content-Length: {len(BODY)}\r\n".encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
H2_PREFACE, H2_SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


class Runs:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self._path), "w")


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture
async def cluster(start_cluster: StartCluster, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Cluster]:
    """Fails if anything of a client is left in the end, or the server itself failed on the way."""
    cluster = await start_cluster(gateway={"client_timeout_s": TIMEOUT_S}, max_num_seqs=64, num_blocks=32)
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    await ask(cluster)
    before = traces(cluster)
    yield cluster
    await ask(cluster)
    await eventually(lambda: all(now <= then for now, then in zip(traces(cluster), before, strict=True)))
    assert failures == []
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def traces(cluster: Cluster) -> tuple[int, ...]:
    """Requests anywhere, the tenant's count of them, open files, tasks, and blocks in use."""
    controller, load = cluster.controller, cluster.launcher.launched[0].engine.scheduler.load()
    status, tenants = cluster.service.status(), cluster.service.tenants
    return (
        len(controller._intake.streams.in_flight()) + status.num_queued + status.num_running + load.num_running,
        tenants.limits(tenants.authenticate(None)).num_in_flight,
        len(os.listdir("/proc/self/fd")),
        len(asyncio.all_tasks()),
        load.num_used_blocks,
    )


async def ask(cluster: Cluster) -> None:
    """A request of an honest client at each door."""
    async with AsyncClient(cluster.service.addresses.grpc) as client:
        assert len((await client.generate([1, 2], max_tokens=3, timeout_s=10)).token_ids) == 3
    async with asyncio.timeout(60):
        assert (await post(cluster, "/v1/completions", json.loads(BODY)))[0] == 200


@asynccontextmanager
async def connection(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until_closed(address: str, data: bytes, *, drip: bytes = b"") -> bytes:
    """All that the server answers before it closes; `drip` is what the client sends, again and again, meanwhile."""
    answer = b""
    async with asyncio.timeout(30), connection(address) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(data)

            async def go_on() -> None:
                with contextlib.suppress(ConnectionError):
                    while drip and not writer.is_closing():
                        writer.write(drip)
                        await asyncio.sleep(TIMEOUT_S / 10)

            dripping = asyncio.ensure_future(go_on())
            try:
                while part := await reader.read(2**16):
                    answer += part
            finally:
                dripping.cancel()
    return answer


def status_of(answer: bytes) -> int:
    """Of the last response; an error has the form of all errors, and nothing of Python's."""
    head, _, body = answer[answer.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status >= 400:
        error = json.loads(body)["error"]
        assert error["message"]
        assert error["code"]
        assert b"Traceback" not in answer
        assert b".py" not in answer
    return status


async def at_once(calls: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    gate = asyncio.Semaphore(32)

    async def one(call: Coroutine[Any, Any, Any]) -> Any:
        async with gate:
            return await call

    return await asyncio.gather(*map(one, calls))


NO_HTTP = {
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "a signed length": (POST + b"Content-Length: +29\r\n\r\n" + BODY, 400),
    "a huge length": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 400),
    "two lengths": (POST + LENGTH + b"Content-Length: 2\r\n\r\n" + BODY, 400),
    "a list of lengths": (POST + b"Content-Length: 29, 2\r\n\r\n" + BODY, 400),
    "length and chunks": (POST + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HEALTH, 400),
    "chunks and length": (POST + b"Transfer-Encoding: chunked\r\n" + LENGTH + b"\r\n0\r\n\r\n" + HEALTH, 400),
    "another encoding": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
    "two encodings": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    "a space before the colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    "a negative chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabcde", 400),
    "a long chunk extension": (POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 100_000, 431),
    "an endless head": (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000, 431),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "a zero byte": (b"GET /hea\0lth HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "TLS": (bytes.fromhex("16030100a5010000a10303") + bytes(150), 400),
    "garbage behind a request": (POST + LENGTH + b"\r\n" + BODY + b"garbage\r\n\r\n", 400),
    "a body that is not UTF-8": (POST + b"Content-Length: 15\r\nConnection: close\r\n\r\n" + b'{"prompt":"\xff\xfe"}', 400),
    "a path of bytes": (b"GET /v1/models/%ff%00%0d%0aX HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "a path of 100 KB": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "a way out": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "another method": (b"BREW /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
}


async def test_what_is_no_http_gets_an_error(cluster: Cluster, tmp_path: Path) -> None:
    address, trace = cluster.service.addresses.http, tmp_path / "it-ran"
    cases = {**NO_HTTP, "a pickle": (pickle.dumps(Runs(trace)) + b"\r\n\r\n", 400)}
    answers = await at_once([until_closed(address, data) for data, _ in cases.values()])
    statuses = {name: status_of(answer) for name, answer in zip(cases, answers, strict=True)}
    assert statuses == {name: status for name, (_, status) in cases.items()}
    assert max(map(len, answers)) < 4000
    assert not trace.exists()


async def test_damaged_requests_end_in_finite_time(cluster: Cluster, rng: random.Random) -> None:
    whole = POST + LENGTH + b"Connection: close\r\n\r\n" + BODY
    calls = [until_closed(cluster.service.addresses.http, damaged(rng, whole)) for _ in range(200)]
    for answer in await at_once(calls):
        assert status_of(answer) in (200, 400, 404, 405, 408, 422, 431, 501)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """With some bytes changed, cut out, doubled, or put in."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, end = sorted((rng.randrange(len(result) + 1), rng.randrange(len(result) + 1)))
        end = min(end, at + 20)
        match rng.randrange(4):
            case 0:
                result[at:end] = rng.randbytes(end - at)
            case 1:
                del result[at:end]
            case 2:
                result[at:at] = result[at:end]
            case 3:
                result[at:at] = rng.randbytes(rng.randint(1, 4))
    return bytes(result)


async def test_many_requests_in_one_packet_are_answered_in_order(cluster: Cluster) -> None:
    last = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    answer = await until_closed(cluster.service.addresses.http, (HEALTH + POST + LENGTH + b"\r\n" + BODY) * 50 + last)
    kinds = [b'"ok"' in part for part in answer.split(b"HTTP/1.1 200 OK")[1:]]
    assert kinds == [True, False] * 50 + [True]


SLOW = {
    "says nothing": (b"", b""),
    "half a head": (POST, b""),
    "a head without an end": (POST, b"a: b\r\n"),
    "half a body": (POST + LENGTH + b"\r\n{", b""),
    "a body without an end": (POST + b"Content-Length: 100000\r\n\r\n", b" "),
    "chunks without an end": (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a body that nobody asked for": (HEALTH.replace(b"\r\n\r\n", b"\r\nContent-Length: 100000\r\n\r\n"), b" "),
    "nothing after an answer": (HEALTH, b""),
}


async def test_slow_clients_are_cut_off(cluster: Cluster) -> None:
    names = [name for name in SLOW for _ in range(4)]
    address = cluster.service.addresses.http
    slow = asyncio.ensure_future(at_once([until_closed(address, SLOW[name][0], drip=SLOW[name][1]) for name in names]))
    await ask(cluster)
    for name, answer in zip(names, await slow, strict=True):
        answered = name in ("a body that nobody asked for", "nothing after an answer")
        assert status_of(answer) == (200 if answered else 408), name


async def test_idle_connections_give_way(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(gateway={"max_connections": 8})
    address = cluster.service.addresses.http
    async with contextlib.AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(connection(address)) for _ in range(8)]
        for _, writer in idle[:4]:
            writer.write(POST + LENGTH + b"\r\n{")
        for _ in range(12):
            assert (await post(cluster, "/v1/completions", json.loads(BODY)))[0] == 200
        ended = [reader.at_eof() or reader.exception() is not None for reader, _ in idle]
        assert ended == sorted(ended, reverse=True), "the oldest first"
        assert any(ended)


async def test_who_does_not_read_is_cut_off(cluster: Cluster) -> None:
    host, _, port = cluster.service.addresses.http.rpartition(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(client, b"GET /dashboard HTTP/1.1\r\nHost: x\r\n\r\n" * 400)
        connections = cluster.controller._entrance.doors._http._server.server_state.connections
        await eventually(lambda: len(connections) == 1)
        await eventually(lambda: len(connections) == 0)


async def test_a_client_that_shuts_its_side_ends_its_request(cluster: Cluster) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 400, "stream": True}).encode()
    engine = cluster.launcher.launched[0].engine
    engine.step_s = 0.01
    async with connection(cluster.service.addresses.http) as (reader, writer):
        writer.write(POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readuntil(b"data: ")
        writer.write_eof()
        async with asyncio.timeout(60):
            await reader.read()
    engine.step_s = 0.0
    await eventually(lambda: len(engine.aborted) == 1)


WILD = (
    None, True, False, 0, -1, 1, 2**31, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"), "", "x",
    "\ud800", "\0", "1", [], [[]], [None], [[[1]]], ["x", 1], {}, {"x": 1}, {"": {}}, [0] * 3000, "x" * 5000,
    [{"role": "user", "content": "x"}], {"1": 1e400}, {"-1": "x"}, [1.5], ["\ud800"], [-1], [2**40],
)  # fmt: skip
VALID = (
    ("completions", {"prompt": "hello", "max_tokens": 3, "n": 2, "stop": ["zz"], "seed": 1, "logit_bias": {"1": 2}}),
    ("completions", {"prompt": [[1, 2], [3]], "logprobs": 2, "stream": True, "stream_options": {"include_usage": True}}),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 3}),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}], "continue_final_message": True}),
)  # fmt: skip


def wild(rng: random.Random, value: Any) -> Any:
    """A copy with one place changed; a field may get a value of another one."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        if rng.random() < 0.2:
            return {**value, rng.choice([*ChatBody.model_fields, "", "x" * 300]): rng.choice(WILD)}
        return {**value, name: wild(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        return [*value[:index], wild(rng, value[index]), *value[index + 1 :]]
    return rng.choice(WILD)


async def test_wild_json_gets_a_clear_error(cluster: Cluster, rng: random.Random) -> None:
    async def one() -> None:
        path, body = rng.choice(VALID)
        for _ in range(rng.randint(1, 2)):
            body = wild(rng, body)
        data = json.dumps(body).encode()
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        answer = await until_closed(cluster.service.addresses.http, head.encode() + data)
        assert status_of(answer) in (200, 400, 404, 504), (body, answer)
        assert b'"code":"internal"' not in answer, (body, answer)

    await at_once([one() for _ in range(300)])


@pytest.mark.parametrize(
    "data",
    [
        b'{"messages":[' + b"{}," * 300_000 + b"{}]}",
        b'{"messages":[{' + b",".join(b'"%d":0' % n for n in range(100_000)) + b"}]}",
        b'{"messages":[{"role":"user","content":[' + b"{}," * 300_000 + b"{}]}]}",
        b'{"messages":[],"stop":[' + b"0," * 300_000 + b"0]}",
        b'{"messages":[],"logit_bias":{' + b",".join(b'"%d":""' % n for n in range(100_000)) + b"}}",
    ],
)
def test_one_mistake_is_enough(data: bytes) -> None:
    """Who looks for all the mistakes in a large body keeps every other request waiting for seconds."""
    with pytest.raises(InvalidRequest) as refused:
        parse_body(ChatBody, data)
    assert refused.value.__cause__.error_count() <= 3


MESSAGES: dict[str, Message] = {
    "Generate": pb.GenerateRequest(text="hello", sampling={"max_tokens": 3, "stop": ["x"], "logit_bias": {1: 2.0}}),
    "Chat": pb.ChatRequest(messages=[{"role": "user", "content": "x"}], sampling={"max_tokens": 3}, resumable=True),
    "Resume": pb.ResumeRequest(request_id="r", choices=[{"token_ids": [1, 2], "num_chars": 2}]),
    "Abort": pb.AbortRequest(request_id="r"),
    "Tokenize": pb.TokenizeRequest(messages={"messages": [{"role": "user", "content": "x"}]}),
    "ListModels": pb.ListModelsRequest(),
    "ClusterStatus": pb.ClusterStatusRequest(),
    "ExplainRoute": pb.ExplainRouteRequest(request_id="g"),
}  # fmt: skip


async def test_wild_messages_get_a_clear_error(cluster: Cluster, rng: random.Random, tmp_path: Path) -> None:
    assert set(MESSAGES) == {method.name for method in pb.DESCRIPTOR.services_by_name["Inference"].methods}
    trace = tmp_path / "it-ran"
    async with grpc.aio.insecure_channel(cluster.service.addresses.grpc) as channel:

        async def one(method: str, data: bytes) -> None:
            code, details = await end_of(channel, f"/pilotfish.v1.Inference/{method}", data)
            ends = (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
            assert code in ends, (method, data, code, details)
            assert code is grpc.StatusCode.OK or details
            assert "Traceback" not in details

        calls = []
        for method, message in MESSAGES.items():
            whole = message.SerializeToString()
            wild = [damaged(rng, whole) for _ in range(40)]
            cut = [whole[:end] for end in range(len(whole))]
            other = [m.SerializeToString() for m in MESSAGES.values()]
            for data in (*wild, *cut, *other, rng.randbytes(1000), pickle.dumps(Runs(trace)), b"\x80" * 100):
                calls.append(one(method, data))
        await at_once(calls)
    assert not trace.exists()


async def end_of(channel: grpc.aio.Channel, method: str, *messages: bytes, **options: Any) -> tuple[grpc.StatusCode, str]:
    call = channel.stream_stream(method)(iter(messages), **{"timeout": 20, **options})
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await call.code(), str(await call.details())


async def test_messages_and_metadata_have_bounds(cluster: Cluster) -> None:
    async with grpc.aio.insecure_channel(cluster.service.addresses.grpc) as channel:
        generate = "/pilotfish.v1.Inference/Generate"
        text = pb.GenerateRequest(text="x" * 5_000_000).SerializeToString()
        assert (await end_of(channel, generate, text))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        metadata = (("x", "y" * 100_000),)
        assert (await end_of(channel, generate, b"", metadata=metadata))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        named = pb.GenerateRequest(text="x", model="m" * 100_000).SerializeToString()
        code, details = await end_of(channel, generate, named)
        assert (code, len(details) < 2000) == (grpc.StatusCode.NOT_FOUND, True)
        many = pb.ChatRequest(messages=[{"role": "user"}] * 5000).SerializeToString()
        assert "at most 4096" in (await end_of(channel, "/pilotfish.v1.Inference/Chat", many))[1]
        choices = pb.ResumeRequest(request_id="x", choices=[{}] * 1000).SerializeToString()
        assert "at most 128" in (await end_of(channel, "/pilotfish.v1.Inference/Resume", choices))[1]
        at_once = channel.unary_stream(generate)(pb.GenerateRequest(text="x").SerializeToString(), timeout=1e-6)
        assert await at_once.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("method", ["pilotfish.v1.Inference/Generate", "grpc.health.v1.Health/Check"])
async def test_a_call_without_its_request_ends(cluster: Cluster, method: str) -> None:
    async with grpc.aio.insecure_channel(cluster.service.addresses.grpc) as channel:
        waiting = [channel.stream_stream(f"/{method}")(timeout=20) for _ in range(20)]
        await ask(cluster)
        for call in waiting:
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "did not arrive within" in await call.details()
        code, details = await end_of(channel, f"/{method}")
        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "the call ended before its request was sent")


async def test_a_call_whose_answer_is_not_taken_ends(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(gateway={"client_timeout_s": 0.3, "default_timeout_s": 1.0})
    request = pb.GenerateRequest(tokens={"ids": [1]}, sampling={"max_tokens": 3000, "n": 8, "logprobs": 0, "ignore_eos": True})
    async with grpc.aio.insecure_channel(cluster.service.addresses.grpc) as channel:
        before = len(asyncio.all_tasks())
        call = channel.stream_stream("/pilotfish.v1.Inference/Generate")(iter([request.SerializeToString()]))
        await anext(answer := aiter(call))
        handling = {task for task in asyncio.all_tasks() if task.get_name().startswith("HandleExceptions")}
        assert len(handling) == 1
        await eventually(lambda: all(task.done() for task in handling))
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in answer:
                pass
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: len(asyncio.all_tasks()) <= before)


async def test_connections_that_speak_no_grpc_are_closed(cluster: Cluster, tmp_path: Path) -> None:
    pickled, tls = pickle.dumps(Runs(tmp_path / "it-ran")), b"\x16\x03\x01" + bytes(300)
    cases = (b"", H2_PREFACE[:10], H2_PREFACE, H2_PREFACE + H2_SETTINGS, HEALTH, tls, pickled)
    await at_once([until_closed(cluster.service.addresses.grpc, data) for data in cases for _ in range(3)])
    assert not os.listdir(tmp_path)


async def test_watchers_of_health_are_bounded_and_hold_up_nobody(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.service.addresses.grpc) as channel:
        watch = channel.stream_stream("/grpc.health.v1.Health/Watch")
        calls = [watch(iter([b""])) for _ in range(256)]
        for call in calls:
            async with asyncio.timeout(60):
                assert await call.read() == b"\x08\x01"
        code, _ = await end_of(channel, "/grpc.health.v1.Health/Watch", b"")
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await end_of(channel, "/grpc.health.v1.Health/Check", b""))[0] is grpc.StatusCode.OK
        cluster.controller._entrance.doors._grpc.set_serving(False)
        async with asyncio.timeout(60):
            assert await calls[-1].read() == b"\x08\x02"
        cluster.controller._entrance.doors._grpc.set_serving(True)
        for call in calls:
            call.cancel()


async def test_the_door_has_places_for_so_many_connections(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(gateway={"max_connections": 4, "client_timeout_s": 30.0})
    async with contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(connection(cluster.service.addresses.grpc)) for _ in range(4)]
        for reader, _ in held:
            async with asyncio.timeout(60):
                await reader.readexactly(9)  # the server's settings
        assert await until_closed(cluster.service.addresses.grpc, b"") == b""
