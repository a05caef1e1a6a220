"""Clients that lose their connection, and controllers that are replaced under them: `Resume` goes on at the next token.

The SDK does it by itself; every test reads through it and compares with what an undisturbed engine answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import expected_tokens
from local_workers import Cluster, LocalLauncher, LocalWorker, StartCluster
from pilotfish.client import AsyncClient, RetryPolicy
from pilotfish.common.api_keys import hash_line, make_key
from pilotfish.common.config import TenantConfig
from pilotfish.common.errors import InvalidRequest, Overloaded, RequestNotFound, Unavailable
from pilotfish.controller.controller import Controller
from pilotfish.controller.journal import Journal, entry_of, prepared_of
from pilotfish.controller.sequence_state import Received
from pilotfish.proto import inference_pb2 as pb
from pilotfish.proto.inference_pb2_grpc import InferenceStub
from reading import Answer, Choice, eventually, read, read_until
from tcp_proxy import TcpProxy

PROMPT = [5, 6, 7, 8]
QUICK = RetryPolicy(initial_backoff_s=0.02, max_backoff_s=0.1)


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[TcpProxy]:
    """The address that clients know; a test says where it leads."""
    proxy = TcpProxy("127.0.0.1:1")
    proxy.address = await proxy.start()  # type: ignore[attr-defined]
    yield proxy
    await proxy.stop()


@pytest.fixture
async def client(door: TcpProxy) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(door.address, retry=QUICK, timeout_s=30) as sdk:  # type: ignore[attr-defined]
        yield sdk


async def crash(cluster: Cluster) -> dict[str, LocalWorker]:
    """As if the controller's process had died: nothing is told to anybody. Returns its workers, which live on."""
    controller: Controller = cluster.controller
    living = {
        replica.name: next(w for w in cluster.launcher.launched if w.places == [p.serving for p in replica.places])
        for replica in controller._fleet._replicas
    }

    async def nothing() -> None:
        pass

    real_ends = {name: worker.end for name, worker in living.items()}
    for worker in living.values():
        worker.end = nothing  # type: ignore[method-assign]
        worker.engine.gate.clear()  # no answer ends meanwhile
    doors = controller._entrance.doors
    assert doors._grpc is not None
    await doors._grpc._server.stop(0)  # before the streams: a reader would take what is marked as ended for whole
    for stream in controller._intake.streams.in_flight():
        stream.ended = True  # nothing happens to it any more
        stream._timer.cancel()
    for task in controller._fleet._tasks:
        task.cancel()
    await asyncio.gather(*controller._fleet._tasks, return_exceptions=True)
    controller._fleet._replicas.clear()
    controller._intake.streams._journal.close(remove=False)
    for name, worker in living.items():
        worker.end = real_ends[name]  # type: ignore[method-assign]
        worker.engine.gate.set()
    return living


async def successor(start_cluster: StartCluster, door: TcpProxy, first: Cluster, journal_path: Path) -> Cluster:
    """A new controller that finds the living workers and the journal of a crashed one."""
    living = await crash(first)
    door.cut()
    launcher = LocalLauncher(living=living, authority=first.launcher.authority, engine_options=first.launcher.engine_options)
    second = await start_cluster(launcher=launcher, journal_path=journal_path)
    door.redirect(second.service.addresses.grpc)
    return second


async def test_a_cut_client_connection_is_resumed_at_the_next_token(
    start_cluster: StartCluster, door: TcpProxy, client: AsyncClient
) -> None:
    cluster = await start_cluster(step_s=0.002)
    door.redirect(cluster.service.addresses.grpc)
    stream = client.stream_generate(PROMPT, max_tokens=300, n=2, logprobs=1)
    num_cuts = 0
    async for delta in stream:
        if delta.index == 0 and len(stream.completion.token_ids) >= 40 * (num_cuts + 1) and num_cuts < 4:
            num_cuts += 1
            door.cut()
    assert num_cuts == 4
    for choice in stream.completion.choices:
        assert list(choice.token_ids) == expected_tokens(PROMPT, 300)
        assert [entry.token_id for entry in choice.logprobs] == expected_tokens(PROMPT, 300)
    assert stream.completion.usage is not None
    assert stream.completion.usage.completion_tokens == 600
    assert len(cluster.launcher.launched[0].engine.submitted) == 2  # it ran on, it was not run again


async def test_the_end_of_an_answer_can_be_read_again(start_cluster: StartCluster) -> None:
    """The last messages may have been on the way when the connection broke."""
    cluster = await start_cluster()
    handle = await cluster.service.start_request(
        request_id="r", prompt="Once upon", sampling={"max_tokens": 9}, resumable=True, echo=True
    )
    whole = (await read(handle)).choices[0]
    for num_tokens, num_chars in ((0, 0), (4, 3), (9, len(whole.text))):
        again = Answer()
        resumed = await cluster.service.resume("r", [Received(tuple(whole.token_ids[:num_tokens]), num_chars)])
        again.choices[0] = Choice(token_ids=list(whole.token_ids[:num_tokens]), text=whole.text[:num_chars])
        await read(resumed, into=again)
        assert again.choices[0].token_ids == whole.token_ids
        assert again.choices[0].text == whole.text
        assert again.choices[0].finish_reason is whole.finish_reason


async def test_only_resumable_requests_can_be_resumed_and_only_with_what_they_said(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.005, gateway={"resume_window_s": 0.2})
    with pytest.raises(RequestNotFound, match="'nobody' can be resumed"):
        await cluster.service.resume("nobody", [Received()])
    plain = await cluster.service.start_request(request_id="plain", prompt=PROMPT, sampling={"max_tokens": 4000})
    with pytest.raises(RequestNotFound):
        await cluster.service.resume("plain", [Received()])
    plain.cancel()
    handle = await cluster.service.start_request(
        request_id="mine", prompt=PROMPT, sampling={"max_tokens": 4000}, resumable=True
    )
    await read_until(handle, Answer(), lambda a: a.num_deltas >= 3)
    for wrong in ([], [Received(), Received()], [Received((1, 1), 0)], [Received((), 10**6)]):
        with pytest.raises(InvalidRequest):
            await cluster.service.resume("mine", wrong)


async def test_a_client_that_stays_away_frees_its_blocks(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.005, gateway={"resume_window_s": 0.2})
    handle = await cluster.service.start_request(request_id="r", prompt=PROMPT, sampling={"max_tokens": 4000}, resumable=True)
    await read_until(handle, Answer(), lambda a: a.num_deltas >= 3)
    await handle.aclose()
    await asyncio.sleep(0.1)
    assert cluster.service.status().num_running == 1
    await eventually(lambda: cluster.launcher.launched[0].engine.scheduler.load().num_used_blocks == 0)
    await eventually(lambda: not list(cluster.controller._intake.streams._ended))
    with pytest.raises(RequestNotFound):
        await cluster.service.resume("r", [Received()])


async def test_a_client_that_leaves_on_purpose_frees_its_blocks_at_once(
    start_cluster: StartCluster, door: TcpProxy, client: AsyncClient
) -> None:
    cluster = await start_cluster(step_s=0.002)
    door.redirect(cluster.service.addresses.grpc)
    async with client.stream_generate(PROMPT, max_tokens=4000) as stream:
        await anext(stream)
    await eventually(lambda: cluster.launcher.launched[0].engine.scheduler.load().num_used_blocks == 0)
    await eventually(lambda: cluster.service.status().num_running == 0)


async def test_a_later_reader_ends_an_earlier_one(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.002)
    first = await cluster.service.start_request(request_id="r", prompt=PROMPT, sampling={"max_tokens": 100}, resumable=True)
    second = await cluster.service.resume("r", [Received()])
    with pytest.raises(Exception, match="read by another call"):
        await anext(first)
    answer = await read(second)
    assert answer.choices[0].token_ids == expected_tokens(PROMPT, 100)


CASES: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 11, "n": 3},
    {"temperature": 1.0, "seed": 3, "n": 2, "logprobs": 0, "presence_penalty": 0.5},
    {"temperature": 1.0, "seed": 7, "n": 3, "logprobs": 0, "stop": 20},
]


@pytest.mark.parametrize("sampling", CASES, ids=[" ".join(case) for case in CASES])
async def test_a_controller_restart_mid_stream_loses_and_repeats_nothing(
    start_cluster: StartCluster, door: TcpProxy, client: AsyncClient, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    journal_path = tmp_path / "journal.sqlite"
    first = await start_cluster(
        journal_path=journal_path, launcher=LocalLauncher(engine_options={"step_s": 0.004, "uses_seeds": True})
    )
    door.redirect(first.service.addresses.grpc)
    if "stop" in sampling:  # it ends the first choice before the break
        text = (await client.generate(PROMPT, max_tokens=200, **{**sampling, "stop": []})).text
        sampling = {**sampling, "stop": [text[sampling["stop"] : sampling["stop"] + 8]]}
    undisturbed = await client.generate(PROMPT, max_tokens=200, **sampling)
    stream = client.stream_generate(PROMPT, max_tokens=200, **sampling)
    await anext(stream)
    while any(len(choice.token_ids) < 30 and choice.finish_reason is None for choice in stream.completion.choices):
        await anext(stream)
    worker = first.launcher.launched[0]
    num_submitted = len(worker.engine.submitted)
    await successor(start_cluster, door, first, journal_path)
    completion = await stream.read_all()
    for choice, other in zip(completion.choices, undisturbed.choices, strict=True):
        assert choice.token_ids == other.token_ids
        assert (choice.text, choice.logprobs) == (other.text, other.logprobs)
        assert (choice.finish_reason, choice.stop_reason) == (other.finish_reason, other.stop_reason)
    assert completion.usage is not None
    assert undisturbed.usage is not None
    assert completion.usage.prompt_tokens == undisturbed.usage.prompt_tokens
    assert completion.usage.completion_tokens == undisturbed.usage.completion_tokens
    assert all(len(request.prompt_token_ids) == len(PROMPT) for request in worker.engine.submitted)
    if "logprobs" not in sampling:
        assert len(worker.engine.submitted) == num_submitted  # the new controller took the run over, it was not run again


async def test_a_restored_request_belongs_to_its_tenant_and_no_other_may_have_it(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    keys = {name: make_key(name.encode().ljust(8), name.encode().ljust(32)) for name in ("acme", "zoo")}
    tenants = {name: TenantConfig(keys=(hash_line(key),), max_requests=1) for name, key in keys.items()}
    journal_path = tmp_path / "journal.sqlite"
    first = await start_cluster(journal_path=journal_path, tenants=tenants, step_s=0.005)
    acme, zoo = (first.service.tenants.authenticate(f"Bearer {key}") for key in keys.values())
    handle = await first.service.start_request(
        request_id="r", prompt=PROMPT, sampling={"max_tokens": 200}, resumable=True, tenant=acme
    )
    await read_until(handle, Answer(), lambda a: a.num_deltas >= 2)
    launcher = LocalLauncher(living=await crash(first), authority=first.launcher.authority)
    second = await start_cluster(launcher=launcher, journal_path=journal_path, tenants=tenants)
    assert second.service.tenants.limits(acme).num_in_flight == 1
    with pytest.raises(RequestNotFound):
        await second.service.resume("r", [Received()], tenant=zoo)
    assert not await second.service.abort("r", tenant=zoo)
    async with AsyncClient(second.service.addresses.grpc, retry=RetryPolicy(max_attempts=1), api_key=keys["acme"]) as sdk:
        with pytest.raises(Overloaded):
            await sdk.generate(PROMPT, max_tokens=1)
    async with grpc.aio.insecure_channel(second.service.addresses.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="an API key is needed"):
            await anext(aiter(InferenceStub(channel).Resume(pb.ResumeRequest(request_id="r"))))  # type: ignore[no-untyped-call]
    answer = await read(await second.service.resume("r", [Received()], tenant=acme))
    assert answer.choices[0].token_ids == expected_tokens(PROMPT, 200)
    assert second.service.tenants.limits(acme).num_in_flight == 0
    (request,) = launcher.launched[0].engine.submitted if launcher.launched else first.launcher.launched[0].engine.submitted
    assert request.tenant == acme


async def test_a_controller_restart_keeps_what_was_queued(
    start_cluster: StartCluster, door: TcpProxy, client: AsyncClient, tmp_path: Path
) -> None:
    journal_path = tmp_path / "journal.sqlite"
    first = await start_cluster(journal_path=journal_path, max_num_seqs=1, step_s=0.002)
    door.redirect(first.service.addresses.grpc)
    reads = [asyncio.create_task(client.generate([*PROMPT, k], max_tokens=150)) for k in range(6)]
    await eventually(lambda: first.service.status().num_queued >= 4)
    await successor(start_cluster, door, first, journal_path)
    for k, completion in enumerate(await asyncio.gather(*reads)):
        assert list(completion.token_ids) == expected_tokens([*PROMPT, k], 150)


async def test_a_controller_and_its_worker_may_die_together(
    start_cluster: StartCluster, door: TcpProxy, client: AsyncClient, tmp_path: Path
) -> None:
    """Then only the client has the tokens: it brings them."""
    journal_path = tmp_path / "journal.sqlite"
    first = await start_cluster(journal_path=journal_path, step_s=0.002)
    door.redirect(first.service.addresses.grpc)
    stream = client.stream_generate(PROMPT, max_tokens=200)
    while len(stream.completion.token_ids) < 30:
        await anext(stream)
    await first.launcher.launched[0].kill()
    second = await successor(start_cluster, door, first, journal_path)
    assert list((await stream.read_all()).token_ids) == expected_tokens(PROMPT, 200)
    (resumed,) = second.launcher.launched[0].engine.submitted
    assert len(resumed.output_token_ids) >= 30


async def test_a_stop_string_that_straddles_the_break_ends_the_answer_once(
    start_cluster: StartCluster, door: TcpProxy, client: AsyncClient, tmp_path: Path
) -> None:
    journal_path = tmp_path / "journal.sqlite"
    first = await start_cluster(journal_path=journal_path, step_s=0.004)
    door.redirect(first.service.addresses.grpc)
    plain = await client.generate(PROMPT, max_tokens=100)
    middle = len(plain.text) // 2
    stop = plain.text[middle : middle + 8]
    undisturbed = await client.generate(PROMPT, max_tokens=100, stop=[stop])
    stream = client.stream_generate(PROMPT, max_tokens=100, stop=[stop])
    while len(stream.completion.token_ids) < len(undisturbed.token_ids) - 2:  # its beginning is held back
        await anext(stream)
    await successor(start_cluster, door, first, journal_path)
    completion = await stream.read_all()
    assert (completion.text, completion.token_ids) == (undisturbed.text, undisturbed.token_ids)
    assert completion.choices[0].stop_reason == stop


async def test_without_a_journal_the_client_hears_that_the_answer_is_lost(
    start_cluster: StartCluster, door: TcpProxy, client: AsyncClient, tmp_path: Path
) -> None:
    first = await start_cluster(journal_path=tmp_path / "one.sqlite", step_s=0.002)
    door.redirect(first.service.addresses.grpc)
    stream = client.stream_generate(PROMPT, max_tokens=4000)
    await anext(stream)
    second = await successor(start_cluster, door, first, tmp_path / "another.sqlite")
    with pytest.raises(Unavailable, match="does not have the request any more"):
        await stream.read_all()
    await eventually(lambda: second.service.status().num_running == 0)


async def test_what_nobody_comes_back_for_leaves_the_journal_and_the_workers(
    start_cluster: StartCluster, door: TcpProxy, tmp_path: Path
) -> None:
    journal_path = tmp_path / "journal.sqlite"
    first = await start_cluster(journal_path=journal_path, step_s=0.005)
    handle = await first.service.start_request(request_id="r", prompt=PROMPT, sampling={"max_tokens": 4000}, resumable=True)
    await read_until(handle, Answer(), lambda a: a.num_deltas >= 2)
    living = await crash(first)
    worker = living["replica-0"]
    second = await start_cluster(
        launcher=LocalLauncher(living=living, authority=first.launcher.authority),
        journal_path=journal_path,
        gateway={"resume_window_s": 0.2},
    )
    await eventually(lambda: worker.engine.scheduler.load().num_used_blocks == 0)
    await eventually(lambda: not list(second.controller._intake.streams._journal.entries()))
    await second.controller.stop()
    assert not journal_path.exists()


async def test_a_journal_entry_is_the_request_again(start_cluster: StartCluster, tmp_path: Path) -> None:
    cluster = await start_cluster(journal_path=tmp_path / "journal.sqlite")
    front_end = cluster.service._front_end
    sampling = {
        "n": 2,
        "seed": 5,
        "stop": ["x", "yz"],
        "logprobs": 3,
        "logit_bias": {4: 1.5},
        "min_tokens": 2,
        "max_tokens": 50,
    }
    prepared = await front_end.prepare(
        request_id="r",
        prompt="Once upon",
        messages=None,
        continue_final_message=False,
        sampling=sampling,
        limits=cluster.controller._fleet.limits(),
        priority=3,
        salt=b"tenant acme",
        version="",
        with_prompt_text=True,
        timeout_s=9,
    )
    stream = cluster.controller._intake.streams.add("r", timeout_s=9, resumable=True)
    cluster.controller._intake.streams.start(stream, prepared)
    (entry,) = cluster.controller._intake.streams._journal.entries()
    assert abs(entry.deadline_unix_s - time.time() - 9) < 1
    entry.ClearField("deadline_unix_s")
    assert entry == entry_of(stream, prepared)
    again = prepared_of(entry, make_text=front_end.make_text, block_size=16)
    assert again.requests == prepared.requests
    assert (again.prompt_hashes, again.prompt_text) == (prepared.prompt_hashes, prepared.prompt_text)
    assert (again.text_params.stop, again.text_params.min_tokens) == (("x", "yz"), 2)
    assert (tmp_path / "journal.sqlite").stat().st_mode & 0o077 == 0
    stream.refuse()
    assert not list(cluster.controller._intake.streams._journal.entries())


async def test_a_full_disk_refuses_what_would_not_survive_and_costs_nothing_else(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    cluster = await start_cluster(journal_path=tmp_path / "journal.sqlite", step_s=0.002, gateway={"resume_window_s": 0.1})
    service, journal = cluster.service, cluster.controller._intake.streams._journal
    early = await service.start_request(request_id="early", prompt=PROMPT, sampling={"max_tokens": 50}, resumable=True)
    assert journal._database is not None
    journal._database.execute("PRAGMA query_only = ON")  # every write fails
    with pytest.raises(Unavailable, match=r"cannot write its journal .* has to free space"):
        await service.start_request(prompt=PROMPT, sampling={"max_tokens": 5}, resumable=True)
    plain = await service.start_request(prompt=PROMPT, sampling={"max_tokens": 50})
    for handle in (early, plain):
        assert (await read(handle)).choices[0].token_ids == expected_tokens(PROMPT, 50)
    await eventually(lambda: not cluster.controller._intake.streams._ended)
    assert service.status().num_running == 0
    journal._database.execute("PRAGMA query_only = OFF")
    later = await service.start_request(prompt=PROMPT, sampling={"max_tokens": 5}, resumable=True)
    assert (await read(later)).choices[0].token_ids == expected_tokens(PROMPT, 5)


def test_a_journal_that_cannot_be_kept_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot keep the journal of requests"):
        Journal(tmp_path / "file" / "journal.sqlite")
