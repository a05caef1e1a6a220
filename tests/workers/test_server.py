"""The worker's gRPC server around an engine with real scheduling and no model."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
from fake_engine import FakeEngine, expected_tokens
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from parts import AUTHORITY, CONTROLLER, LEADER, LEADER_NAME, open_channel
from pilotfish.common.errors import Overloaded
from pilotfish.common.requests import FinishReason
from pilotfish.controller.authority import Authority
from pilotfish.proto import worker_pb2, worker_pb2_grpc
from pilotfish.proto.credentials import channel_credentials, channel_options, explain
from pilotfish.workers.server import WorkerServer
from pilotfish.workers.worker_service import ServerLimits
from worker_session import PROMPT, session


@dataclass
class Worker:
    engine: FakeEngine
    address: str


StartWorker = Callable[..., Worker]


@pytest.fixture
def start_worker() -> Iterator[StartWorker]:
    running: list[tuple[WorkerServer, FakeEngine]] = []

    def start(*, limits: ServerLimits | None = None, **engine_options: object) -> Worker:
        server = WorkerServer(limits or ServerLimits(heartbeat_interval_s=0.05), LEADER)
        engine = FakeEngine(server.on_step, **engine_options)  # type: ignore[arg-type]
        running.append((server, engine))
        return Worker(engine, server.start(engine, engine.info(epoch=3), host="127.0.0.1"))

    yield start
    for server, engine in running:
        engine.stop()
        server.stop()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_request_that_is_known_is_not_run_again(start_worker: StartWorker) -> None:
    worker = start_worker()
    async with session(worker.address) as controller:
        await controller.submit("a", max_tokens=3)
        await controller.submit("a", max_tokens=3)
        await controller.finish("a")
        await controller.submit("a", max_tokens=3)  # ended, not acknowledged
        await controller.submit("b", max_tokens=3)
        await controller.finish("b")
        assert [request.request_id for request in worker.engine.submitted] == ["a", "b"]
        await controller.send(ack=worker_pb2.Ack(step_id=controller.steps[-1]))
        controller.outputs.clear()
        await controller.submit("a", max_tokens=3)  # acknowledged: the id is free
        await controller.finish("a")
        assert controller.tokens("a") == expected_tokens(PROMPT, 3)


async def test_another_epoch_is_refused(start_worker: StartWorker) -> None:
    worker = start_worker()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async with session(worker.address, epoch=2):
            pass
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "epoch 3, not 2" in refused.value.details()


@pytest.mark.parametrize("shown", ["nothing", "no certificate", "another cluster's", "another cluster's in this one's name"])
async def test_who_is_no_part_of_the_cluster_is_refused(start_worker: StartWorker, shown: str) -> None:
    stranger = Authority.create().issue("controller")
    credentials = {
        "nothing": None,
        "no certificate": grpc.ssl_channel_credentials(AUTHORITY.certificate),
        "another cluster's": channel_credentials(stranger),
        "another cluster's in this one's name": channel_credentials(replace(stranger, authority=AUTHORITY.certificate)),
    }[shown]
    address, options = start_worker().address, channel_options(LEADER_NAME)
    channel = grpc.aio.secure_channel(address, credentials, options) if credentials else grpc.aio.insecure_channel(address)
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await worker_pb2_grpc.WorkerStub(channel).Snapshot(worker_pb2.SnapshotRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("name", [LEADER_NAME, "replica-0.3.1", "replica-1.2.0", "Controller"])
async def test_other_parts_of_the_cluster_cannot_pass_as_the_controller(start_worker: StartWorker, name: str) -> None:
    worker, identity = start_worker(), AUTHORITY.issue(name)
    options = channel_options(LEADER_NAME)
    async with grpc.aio.secure_channel(worker.address, channel_credentials(identity), options=options) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        calls = [
            stub.Snapshot(worker_pb2.SnapshotRequest(), timeout=10),
            stub.Drain(worker_pb2.DrainRequest(), timeout=10),
            stub.Connect(timeout=10).read(),  # refused before it says anything
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError, match="only the controller") as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    async with session(worker.address) as controller:  # and it is not draining
        await controller.submit("a")
        assert (await controller.finish("a")).finish_reason is FinishReason.LENGTH


async def test_what_is_no_protocol_harms_nobody(start_worker: StartWorker, tmp_path: Path) -> None:
    """Bytes on the bare port, pickles that would run something among them, and bytes in place of messages."""
    worker, trace = start_worker(), tmp_path / "it-ran"
    rng = random.Random(5)
    host, _, port = worker.address.rpartition(":")
    async with session(worker.address) as controller:
        await controller.submit("a", max_tokens=400)
        for data in (
            pickle.dumps(_Runs(trace)),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            *(rng.randbytes(2000) for _ in range(5)),
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(60):
                with contextlib.suppress(ConnectionError):
                    await reader.read()  # closed by the worker
            writer.close()
        async with open_channel(worker.address) as channel:
            for method in ("Snapshot", "Drain", "Connect"):
                for data in (pickle.dumps(_Runs(trace)), rng.randbytes(100)):
                    call = channel.stream_stream(f"/pilotfish.v1.Worker/{method}")(iter([b"\xff" + data]), timeout=10)
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await call.read()
                    assert refused.value.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
                    assert "Traceback" not in refused.value.details()
        assert (await controller.finish("a")).finish_reason is FinishReason.LENGTH
    assert not trace.exists()


class _Runs:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self._path), "w")


async def test_a_worker_of_another_start_is_not_taken_for_this_one(start_worker: StartWorker) -> None:
    options = channel_options("replica-0.4.0")
    async with grpc.aio.secure_channel(start_worker().address, channel_credentials(CONTROLLER), options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await worker_pb2_grpc.WorkerStub(channel).Snapshot(worker_pb2.SnapshotRequest(), timeout=10)
    assert "no part of this cluster" in explain(refused.value.details())


async def test_the_first_message_must_be_attach(start_worker: StartWorker) -> None:
    async with open_channel(start_worker().address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Connect()
        await call.write(worker_pb2.ControllerMessage(ack=worker_pb2.Ack(step_id=1)))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async with asyncio.timeout(60):
                await call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_new_connection_replaces_the_old_one(start_worker: StartWorker) -> None:
    worker = start_worker()
    async with session(worker.address, controller_id="old") as old, session(worker.address, controller_id="new") as new:
        async with asyncio.timeout(60):
            assert await _read_past_heartbeats(old.call) is grpc.aio.EOF
        await new.submit("a")
        await new.finish("a")
        assert new.tokens("a") == expected_tokens(PROMPT, 5)


async def _read_past_heartbeats(call: grpc.aio.StreamStreamCall) -> object:
    while (message := await call.read()) is not grpc.aio.EOF and message.HasField("heartbeat"):
        pass
    return message


async def test_a_long_step_shows_in_heartbeats_and_health_and_delays_no_call(start_worker: StartWorker) -> None:
    worker = start_worker(stall_timeout_s=0.2)
    worker.engine.gate.clear()
    async with open_channel(worker.address) as channel, session(worker.address) as controller:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="pilotfish.v1.Worker")
        assert (await health.Check(request, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
        await controller.receive_until(lambda s: len(s.heartbeats) > 0)
        assert not controller.heartbeats[0].busy
        await controller.submit("a", max_tokens=1000)
        await controller.receive_until(lambda s: s.heartbeats[-1].busy and s.heartbeats[-1].step_age_s > 0.2)
        assert controller.heartbeats[-1].phase == "step"

        async def status() -> int:
            return (await health.Check(request, timeout=5)).status

        async with asyncio.timeout(60):
            while await status() != health_pb2.HealthCheckResponse.NOT_SERVING:
                await asyncio.sleep(0.02)
        await controller.send(aborts=[worker_pb2.Abort(request_id="a")])
        await eventually(lambda: worker.engine.aborted == ["a"])  # accepted although the step hangs
        worker.engine.gate.set()
        assert (await controller.finish("a")).finish_reason is FinishReason.ABORT
        async with asyncio.timeout(60):
            while await status() != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.02)


async def test_a_full_outbox_ends_requests_and_loses_nothing(start_worker: StartWorker) -> None:
    worker = start_worker(limits=ServerLimits(outbox_bytes=3000))
    async with session(worker.address) as controller:
        await controller.submit("a", max_tokens=2000)
        last = await controller.finish("a")
        assert last.finish_reason is FinishReason.ABORT
        tokens = controller.tokens("a")
        assert 10 < len(tokens) < 200
        assert tokens == expected_tokens(PROMPT, len(tokens))
        await controller.submit("b", max_tokens=3)
        refused = await controller.finish("b")
        assert refused.finish_reason is FinishReason.ABORT
        assert "unacknowledged" in refused.error
        await controller.send(ack=worker_pb2.Ack(step_id=controller.steps[-2]))
        await controller.submit("c", max_tokens=3)
        assert (await controller.finish("c")).finish_reason is FinishReason.LENGTH


async def test_requests_of_a_controller_that_stays_away_are_ended(start_worker: StartWorker) -> None:
    worker = start_worker(step_s=0.005, limits=ServerLimits(away_timeout_s=0.1))
    async with session(worker.address) as first:
        await first.submit("a", max_tokens=4000)
        await first.receive_until(lambda s: len(s.steps) >= 2)
    await eventually(lambda: worker.engine.aborted == ["a"])
    async with session(worker.address) as second:
        assert (await second.finish("a")).finish_reason is FinishReason.ABORT
        tokens = second.tokens("a")
        assert tokens == expected_tokens(PROMPT, len(tokens))
        await second.submit("b", max_tokens=3)
        assert (await second.finish("b")).finish_reason is FinishReason.LENGTH


async def test_a_controller_that_comes_back_in_time_finds_its_requests_running(start_worker: StartWorker) -> None:
    worker = start_worker(step_s=0.005, limits=ServerLimits(away_timeout_s=1.0))
    async with session(worker.address) as first:
        await first.submit("a", max_tokens=4000)
        await first.receive_until(lambda s: len(s.steps) >= 2)
    async with session(worker.address):
        await asyncio.sleep(1.2)
        assert worker.engine.aborted == []


async def test_what_the_engine_refuses_is_answered(start_worker: StartWorker) -> None:
    worker = start_worker(refuse=Overloaded("full"))
    async with session(worker.address) as controller:
        await controller.submit("a")
        refused = await controller.finish("a")
        assert (refused.finish_reason, refused.error) == (FinishReason.ABORT, "full")
        await controller.send(aborts=[worker_pb2.Abort(request_id="never heard of")])
        assert (await controller.finish("never heard of")).finish_reason is FinishReason.ABORT
        assert set(controller.steps) == {0}


async def test_drain_waits_for_the_running_and_refuses_the_new(start_worker: StartWorker) -> None:
    worker = start_worker()
    worker.engine.gate.clear()
    async with open_channel(worker.address) as channel, session(worker.address) as controller:
        stub = worker_pb2_grpc.WorkerStub(channel)
        await controller.submit("a", max_tokens=20)
        await eventually(lambda: len(worker.engine.submitted) == 1)
        assert (await stub.Drain(worker_pb2.DrainRequest(), timeout=0.5)).num_left == 1
        drained = stub.Drain(worker_pb2.DrainRequest(), timeout=10)
        worker.engine.gate.set()
        assert (await drained).num_left == 0
        await controller.submit("b")
        assert "draining" in (await controller.finish("b")).error
        assert len(controller.tokens("a")) == 20


async def test_standard_health_and_reflection(start_worker: StartWorker) -> None:
    async with open_channel(start_worker().address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
        answer = await anext(aiter(call))
        names = {service.name for service in answer.list_services_response.service}
        assert names == {"pilotfish.v1.Worker", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_stop_closes_the_port(start_worker: StartWorker) -> None:
    server = WorkerServer(ServerLimits(), LEADER)
    engine = FakeEngine(server.on_step)
    address = server.start(engine, engine.info(), host="127.0.0.1")
    channel = grpc.secure_channel(address, channel_credentials(CONTROLLER), options=channel_options(LEADER_NAME))
    grpc.channel_ready_future(channel).result(timeout=5)
    channel.close()
    engine.stop()
    server.stop()
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5)
