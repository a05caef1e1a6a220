"""Requests through gateways: what clients see of a controller that is replaced, a link that breaks, a gateway that dies.

The gateways live in this process and talk to the controller over real gRPC; test_ray_cluster.py has them as processes.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import expected_tokens
from http_calls import post
from local_gateways import LocalGateway, LocalGatewayLauncher
from local_workers import Cluster, LocalLauncher, LocalWorker, StartCluster
from parts import AUTHORITY
from pilotfish import __version__
from pilotfish.client import AsyncClient, RetryPolicy
from pilotfish.common.api_keys import hash_line, make_key
from pilotfish.common.config import TenantConfig
from pilotfish.common.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, RequestNotFound, Unavailable
from pilotfish.common.identity import CONTROLLER_NAME
from pilotfish.common.requests import FinishReason
from pilotfish.controller import gateway_fleet, remote_intake
from pilotfish.controller.controller_link import ControllerLink, GatewayUnfit
from pilotfish.controller.sequence_state import Received
from pilotfish.controller.service import RequestHandle
from pilotfish.proto import gateway_pb2 as pb
from pilotfish.proto import gateway_pb2_grpc, inference_pb2
from pilotfish.proto.credentials import channel_credentials, channel_options
from reading import Answer, Choice, eventually, read, read_until

PROMPT = [5, 6, 7, 8]
TWO = {"num_gateways": 2}
QUICK = RetryPolicy(initial_backoff_s=0.02, max_backoff_s=0.1)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_fleet, "_RESTART_PAUSE_S", (0.0, 0.05))


async def generate(gateway: LocalGateway, *, max_tokens: int = 200, **options: Any) -> RequestHandle:
    sampling = {"max_tokens": max_tokens, **options.pop("sampling", {})}
    return await gateway.service.start_request(prompt=options.pop("prompt", PROMPT), sampling=sampling, **options)


def launched(cluster: Cluster) -> list[LocalGateway]:
    assert cluster.gateways is not None
    return cluster.gateways.launched


async def nothing_runs(cluster: Cluster) -> None:
    dispatcher, worker = cluster.controller._dispatcher, cluster.launcher.launched[0]
    await eventually(lambda: dispatcher.num_running == 0 and worker.engine.scheduler.load().num_used_blocks == 0)
    assert dispatcher.num_queued == 0
    assert cluster.controller._intake.streams.in_flight() == []
    assert all(not gateway.gateway._intake._requests for gateway in launched(cluster))
    assert all(status.num_streams == 0 for status in cluster.controller.status().gateways)


async def crash(cluster: Cluster) -> dict[str, LocalWorker]:
    """As if the controller's process had died: nothing is told to anybody. Returns its workers, which live on."""
    controller = cluster.controller
    entrance: Any = controller._entrance
    workers = [*cluster.launcher.launched, *cluster.launcher.living.values()]
    living = {
        replica.name: next(w for w in workers if w.places == [p.serving for p in replica.places])
        for replica in controller._fleet._replicas
    }

    async def nothing() -> None:
        pass

    real_ends = {name: worker.end for name, worker in living.items()}
    for worker in living.values():
        worker.end = nothing  # type: ignore[method-assign]
        worker.engine.gate.clear()  # no answer ends meanwhile
    for stream in controller._intake.streams.in_flight():
        stream.ended = True  # nothing happens to it any more
        stream._timer.cancel()
    tasks = [*entrance._fleet._tasks, *controller._fleet._tasks, entrance.server._show_task]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await entrance.server._server.stop(0)
    entrance._fleet._gateways.clear()
    controller._fleet._replicas.clear()
    controller._intake.streams._journal.close(remove=False)
    for name, worker in living.items():
        worker.end = real_ends[name]  # type: ignore[method-assign]
        worker.engine.gate.set()
    return living


async def successor(
    start_cluster: StartCluster, first: Cluster, journal_path: Path, *, living: dict[str, LocalWorker] | None = None
) -> Cluster:
    """A new controller at the same address, which finds what lives (of one that has crashed already, `living`)."""
    address = launched(first)[0].controller_address
    living = living or await crash(first)
    gateways = LocalGatewayLauncher(first.gateways.config, first.gateways.model_path)  # type: ignore[union-attr]
    gateways.living = {f"gateway-{index}": gateway for index, gateway in enumerate(launched(first))}
    return await start_cluster(
        launcher=LocalLauncher(living=living, authority=first.launcher.authority, engine_options=first.launcher.engine_options),
        journal_path=journal_path,
        gateway={"num_gateways": len(launched(first)), "link_port": int(address.rpartition(":")[2])},
        gateways=gateways,
    )


async def test_an_answer_through_a_gateway_is_the_same_and_the_controller_accounts_for_it(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(gateway=TWO)
    handles = [await generate(gateway, max_tokens=20, request_id=f"r{n}") for n, gateway in enumerate(launched(cluster))]
    answers = [await read(handle) for handle in handles]
    for answer in answers:
        assert answer.choices[0].token_ids == expected_tokens(PROMPT, 20)
        tokenizer = launched(cluster)[0].service._front_end.tokenizer
        assert answer.choices[0].text == tokenizer.decode(expected_tokens(PROMPT, 20))
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 20)
        assert answer.usage.replica == "replica-0"
        assert 0 <= answer.usage.queue_ms <= answer.usage.ttft_ms <= answer.usage.total_ms
    with pytest.raises(InvalidRequest, match="empty"):
        await generate(launched(cluster)[0], prompt=[])
    state = cluster.controller.status()
    assert (state.num_requests, state.num_generated_tokens) == (2, 40)
    assert [(gateway.name, gateway.is_connected) for gateway in state.gateways] == [("gateway-0", True), ("gateway-1", True)]
    (decision,) = await launched(cluster)[1].service.explain_route("r0")
    assert decision.replica == "replica-0"

    async def metrics() -> str:
        return (await launched(cluster)[0].gateway._intake.render_metrics())[0].decode()

    async with asyncio.timeout(60):
        while 'pilotfish_requests_total{outcome="invalid_request"} 1.0' not in await metrics():
            await asyncio.sleep(0.01)
    assert 'pilotfish_requests_total{outcome="ok"} 2.0' in await metrics()
    await nothing_runs(cluster)


async def test_a_stop_string_ends_the_run_where_only_the_gateway_sees_text(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.002, gateway={"num_gateways": 1})
    (gateway,) = launched(cluster)
    text = gateway.service._front_end.tokenizer.decode(expected_tokens(PROMPT, 60))
    stop = text[30:36]
    whole = await read(await generate(gateway, max_tokens=4000, sampling={"stop": [stop], "n": 2}))
    for choice in whole.choices.values():
        assert choice.text == text[: text.index(stop)]
        assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, stop)
    await nothing_runs(cluster)
    assert cluster.controller.status().num_generated_tokens < 1000
    assert whole.usage is not None
    content, _ = await gateway.gateway._intake.render_metrics()  # the controller counts the tokens that the client got
    assert f"pilotfish_output_tokens_total {float(whole.usage.completion_tokens)}" in content.decode()


async def test_refusals_deadlines_and_cancels_of_the_controller_reach_the_caller(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(max_num_seqs=2, gateway={"max_queued_requests": 2, **TWO})
    one, other = launched(cluster)
    cluster.launcher.launched[0].engine.gate.clear()
    on_worker = [await generate(one) for _ in range(3)]
    queued = [await generate(other, timeout_s=1.5) for _ in range(2)]  # time to be queued, on a busy machine
    with pytest.raises(Overloaded) as refused:
        await generate(one)
    assert refused.value.retry_after_s
    for handle in queued:
        with pytest.raises(DeadlineExceeded):
            await read(handle)
    waiting = await generate(other, request_id="waiting")
    with pytest.raises(InvalidRequest, match="in flight already"):
        await generate(one, request_id="waiting")
    assert await one.service.abort("waiting")  # whichever gateway has it
    with pytest.raises(Cancelled, match="was aborted"):
        await read(waiting)
    on_worker[0].cancel()
    cluster.launcher.launched[0].engine.gate.set()
    for handle in on_worker[1:]:
        await read(handle)
    await nothing_runs(cluster)


CASES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 11, "n": 3, "logprobs": 1},
]


@pytest.mark.parametrize("sampling", CASES, ids=["greedy", "seeded"])
@pytest.mark.parametrize("resumable", [False, True], ids=["http", "sdk"])
async def test_a_controller_restart_is_a_pause_for_the_clients_of_a_gateway(
    start_cluster: StartCluster, tmp_path: Path, sampling: dict[str, Any], resumable: bool
) -> None:
    first = await start_cluster(
        journal_path=tmp_path / "j",
        gateway=TWO,
        launcher=LocalLauncher(engine_options={"step_s": 0.004, "uses_seeds": True}),
    )
    gateway = launched(first)[1]
    undisturbed = await read(await generate(gateway, sampling={"seed": 0, **sampling}))
    handle = await generate(gateway, sampling={"seed": 0, **sampling}, resumable=resumable)
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 40)
    engine = first.launcher.launched[0].engine
    num_submitted = len(engine.submitted)
    second = await successor(start_cluster, first, tmp_path / "j")
    await read(handle, into=answer)
    for index, choice in answer.choices.items():
        other = undisturbed.choices[index]
        assert (choice.token_ids, choice.text, choice.finish_reason) == (other.token_ids, other.text, other.finish_reason)
    assert answer.usage is not None
    assert undisturbed.usage is not None
    assert answer.usage.completion_tokens == undisturbed.usage.completion_tokens
    if "logprobs" not in sampling:
        assert len(engine.submitted) == num_submitted  # the new controller took the run over, it was not run again
    assert second.controller._dispatcher.num_running == 0
    assert len(second.controller.status().gateways) == 2
    assert len((await read(await generate(gateway, max_tokens=5))).choices[0].token_ids) == 5


async def test_new_calls_wait_for_a_controller_that_is_being_restarted(
    start_cluster: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await start_cluster(journal_path=tmp_path / "j", gateway={"num_gateways": 1})
    (gateway,) = launched(first)
    living = await crash(first)
    await eventually(lambda: not gateway.gateway._link.is_connected)
    with pytest.raises(Unavailable, match="being restarted"):
        gateway.service.status()
    call = asyncio.create_task(generate(gateway, max_tokens=5))
    second = await successor(start_cluster, first, tmp_path / "j", living=living)
    answer = await read(await call)
    assert answer.choices[0].token_ids == expected_tokens(PROMPT, 5)
    monkeypatch.setattr(remote_intake, "_AWAY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(remote_intake, "WAIT_S", 0.1)
    waits = await generate(gateway, max_tokens=4000)
    await crash(second)
    with pytest.raises(Unavailable, match="has been away"):
        await read(waits)
    with pytest.raises(Unavailable, match="probably being restarted"):
        await generate(gateway)


async def test_a_broken_link_is_joined_where_it_broke(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.002, gateway={"num_gateways": 1})
    (gateway,) = launched(cluster)
    handle = await generate(gateway, max_tokens=600, sampling={"logprobs": 0})
    answer = Answer()
    for _ in range(4):
        seen = answer.num_deltas
        await read_until(handle, answer, lambda a, seen=seen: a.num_deltas >= seen + 10)
        gateway.proxy.cut()
    await read(handle, into=answer)
    assert answer.choices[0].token_ids == expected_tokens(PROMPT, 600)
    assert gateway.proxy.num_connections >= 5
    assert len(cluster.launcher.launched[0].engine.submitted) == 1  # it ran on, it was not run again
    await nothing_runs(cluster)


async def test_what_ends_while_the_link_is_broken_is_told_after_it(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.002, gateway={"num_gateways": 1})
    (gateway,) = launched(cluster)
    done, left = await generate(gateway, max_tokens=100), await generate(gateway, max_tokens=4000)
    answer = Answer()
    await read_until(done, answer, lambda a: a.num_deltas >= 3)
    gateway.proxy.redirect("127.0.0.1:1")
    await eventually(lambda: not gateway.gateway._link.is_connected)
    left.cancel()
    await eventually(lambda: cluster.controller._intake.streams.get(done.request_id) is None)  # nobody has seen its end
    gateway.proxy.redirect(gateway.controller_address)
    await read(done, into=answer)
    assert answer.choices[0].token_ids == expected_tokens(PROMPT, 100)
    assert len(cluster.launcher.launched[0].engine.submitted) == 2


async def test_a_client_resumes_through_another_gateway(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.003, gateway=TWO)
    one, other = launched(cluster)
    async with AsyncClient([one.addresses.grpc, other.addresses.grpc], retry=QUICK, timeout_s=30) as client:
        stream = client.stream_generate(PROMPT, max_tokens=300, n=2, logprobs=1)
        while len(stream.completion.token_ids) < 30:
            await anext(stream)
        await one.kill()
        completion = await stream.read_all()
        assert client.address == other.addresses.grpc  # where its next request begins
    for choice in completion.choices:
        assert list(choice.token_ids) == expected_tokens(PROMPT, 300)
        assert [entry.token_id for entry in choice.logprobs] == expected_tokens(PROMPT, 300)
    assert len(cluster.launcher.launched[0].engine.submitted) == 2  # it ran on, it was not run again
    await eventually(lambda: len(launched(cluster)) == 3)
    await eventually(lambda: [g.restarts for g in cluster.controller.status().gateways if g.is_connected] == [1, 0])


async def test_one_reader_a_request_whichever_gateway_it_comes_through(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.003, gateway=TWO)
    one, other = launched(cluster)
    first = await generate(one, max_tokens=200, request_id="r", resumable=True)
    with pytest.raises(RequestNotFound):
        await other.service.resume("nobody", [Received()])
    with pytest.raises(InvalidRequest, match="has 1 choices"):
        await other.service.resume("r", [])
    second = await other.service.resume("r", [Received()])
    with pytest.raises(Cancelled, match="read by another call"):
        await read(first)
    third = await other.service.resume("r", [Received()])
    with pytest.raises(Cancelled, match="read by another call"):
        await read(second)
    answer = Answer()
    await read_until(third, answer, lambda a: a.num_deltas >= 3)
    await third.aclose()  # the connection of its client broke
    choice = answer.choices[0]
    last = await one.service.resume("r", [Received(tuple(choice.token_ids), len(choice.text))])
    resumed = Answer()
    resumed.choices[0] = Choice(token_ids=choice.token_ids, text=choice.text)
    await read(last, into=resumed)
    assert resumed.choices[0].token_ids == expected_tokens(PROMPT, 200)
    assert resumed.choices[0].text == one.service._front_end.tokenizer.decode(expected_tokens(PROMPT, 200))
    await nothing_runs(cluster)
    end = await other.service.resume("r", [Received()])  # the last messages may have been lost
    assert (await read(end)).choices[0].text == resumed.choices[0].text


async def test_tenants_are_the_controllers_whichever_gateway_they_use(start_cluster: StartCluster) -> None:
    key = make_key(b"acme".ljust(8), b"acme".ljust(32))
    cluster = await start_cluster(tenants={"acme": TenantConfig(keys=(hash_line(key),), max_requests=1)}, gateway=TWO)
    one, other = launched(cluster)
    tenant = one.service.tenants.authenticate(f"Bearer {key}")
    cluster.launcher.launched[0].engine.gate.clear()
    running = await generate(one, tenant=tenant)
    with pytest.raises(Overloaded, match="that are its limit"):
        await generate(other, tenant=tenant)
    cluster.launcher.launched[0].engine.gate.set()
    await read(running)
    assert cluster.launcher.launched[0].engine.submitted[0].tenant == tenant
    await nothing_runs(cluster)


async def test_a_gateway_that_is_silent_is_replaced(start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_fleet, "_SILENCE_TIMEOUT_S", 1.5)
    monkeypatch.setattr(gateway_fleet, "_WATCH_INTERVAL_S", 0.05)
    cluster = await start_cluster(gateway={"num_gateways": 1})
    launched(cluster)[0].proxy.silent = True
    await eventually(lambda: len(launched(cluster)) == 2)
    await eventually(lambda: cluster.controller.status().gateways[0].is_connected)
    answer = await read(await generate(launched(cluster)[1], max_tokens=5))
    assert answer.choices[0].token_ids == expected_tokens(PROMPT, 5)


async def test_only_a_gateway_of_this_version_and_cluster_gets_in(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(gateway={"num_gateways": 1})
    (gateway,) = launched(cluster)
    authority = cluster.launcher.authority
    for name, version, status in (
        ("replica-0.1.0", __version__, grpc.StatusCode.PERMISSION_DENIED),  # a worker's certificate
        ("gateway-0", "0.0.1", grpc.StatusCode.FAILED_PRECONDITION),
    ):
        link = ControllerLink(address=gateway.controller_address, identity=authority.issue(name))
        with pytest.raises(GatewayUnfit) as unfit:
            async with asyncio.timeout(60):
                await link.run(pb.GatewayHello(name="gateway-0", version=version), gateway.gateway._intake)
        assert unfit.value.__cause__.code() == status  # type: ignore[union-attr]
    worker, options = channel_credentials(authority.issue("replica-0.1.0")), channel_options(CONTROLLER_NAME)
    async with grpc.aio.secure_channel(gateway.controller_address, worker, options=options) as channel:
        stub = gateway_pb2_grpc.GatewayLinkStub(channel)  # type: ignore[no-untyped-call]
        for call in (
            stub.Metrics(pb.MetricsRequest(), timeout=10),
            stub.Abort(pb.GatewayAbortRequest(request_id="x"), timeout=10),
            stub.ExplainRoute(inference_pb2.ExplainRouteRequest(request_id="x"), timeout=10),
            stub.Connect(iter([pb.GatewayMessage()]), timeout=10).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="only gateways may call") as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    stranger = channel_credentials(AUTHORITY.issue("gateway-0"))
    async with grpc.aio.secure_channel(
        gateway.controller_address, stranger, options=channel_options(CONTROLLER_NAME)
    ) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await gateway_pb2_grpc.GatewayLinkStub(channel).Metrics(pb.MetricsRequest(), timeout=10)  # type: ignore[no-untyped-call]


async def test_http_goes_through_a_gateway_too(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(gateway={"num_gateways": 1})
    status, _, body = await post(cluster, "/v1/completions", {"prompt": "ab", "max_tokens": 6, "temperature": 0})
    tokenizer = cluster.service._front_end.tokenizer
    assert (status, body["choices"][0]["text"]) == (200, tokenizer.decode(expected_tokens(tokenizer.encode("ab"), 6)))
