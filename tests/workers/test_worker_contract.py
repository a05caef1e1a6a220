"""What every worker promises its controller: one suite on a worker that only takes time and on one with a model."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import expected_tokens
from parts import LEADER, open_channel
from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.common.errors import ConfigError
from pilotfish.common.hashing import block_hashes, root_hash
from pilotfish.common.requests import BlockRemoved, BlockStored, FinishReason
from pilotfish.proto import worker_pb2, worker_pb2_grpc
from pilotfish.workers.engine import Engine
from pilotfish.workers.server import WorkerServer
from pilotfish.workers.timed_runner import QWEN3_8B_H200, VOCAB_SIZE, TimedReplica
from pilotfish.workers.worker_service import ServerLimits
from worker_session import PROMPT, session

StartWorker = Callable[..., str]
MAX_MODEL_LEN = 512


@pytest.fixture(params=["timed", "model"])
def start_worker(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[StartWorker]:
    """Starts a worker of epoch 3; returns its address."""
    running: list[tuple[WorkerServer, Engine]] = []
    set_up = TimedReplica(max_model_len=MAX_MODEL_LEN) if request.param == "timed" else None

    def start(limits: ServerLimits | None = None, **engine_options: int) -> str:
        config = EngineConfig(**{"device": "cpu", "num_threads": 1, "num_kv_blocks": 128, "max_num_seqs": 8, **engine_options})
        server = WorkerServer(limits or ServerLimits(heartbeat_interval_s=0.05), LEADER)
        engine = Engine(ModelConfig(model=str(tiny_llama), dtype="float32"), config, on_step=server.on_step, set_up=set_up)
        running.append((server, engine))
        return server.start(engine, replace(engine.start(), epoch=3), host="127.0.0.1")

    yield start
    for server, engine in running:
        engine.stop()
        server.stop()


async def test_requests_run_and_their_tokens_come_in_steps(start_worker: StartWorker) -> None:
    async with session(start_worker()) as controller:
        await controller.submit("a", max_tokens=9)
        await controller.submit("b", max_tokens=4, prompt=[1, 2])
        assert (await controller.finish("a")).finish_reason is FinishReason.LENGTH
        await controller.finish("b")
        await controller.submit("alone", max_tokens=9)
        await controller.finish("alone")
    assert len(controller.tokens("b")) == 4
    assert len(controller.tokens("a")) == 9
    assert controller.tokens("a") == controller.tokens("alone")
    assert controller.steps == list(range(1, len(controller.steps) + 1))


async def test_what_was_not_acknowledged_comes_again_and_nothing_else(start_worker: StartWorker) -> None:
    address = start_worker()
    async with session(address) as first:
        await first.submit("a", max_tokens=60)
        await first.receive_until(lambda s: len(s.steps) >= 10)
    received = 6  # as if the rest had been lost on the way
    async with session(address, acked_step_id=received) as second:
        await second.finish("a")
        await second.submit("undisturbed", max_tokens=60)
        await second.finish("undisturbed")
    assert second.steps == list(range(received + 1, received + 1 + len(second.steps)))
    kept = [output for step, output in zip(first.steps, first.outputs, strict=False) if step <= received]
    second.outputs = kept + second.outputs
    assert second.tokens("a") == second.tokens("undisturbed")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_request_goes_on_from_known_outputs(start_worker: StartWorker, temperature: float) -> None:
    sampling = {"temperature": temperature, "seed": 11, "logprobs": 0}
    async with session(start_worker()) as controller:
        await controller.submit("whole", max_tokens=30, **sampling)
        await controller.finish("whole")
        whole = controller.tokens("whole")
        await controller.submit("rest", max_tokens=30, outputs=whole[:12], **sampling)
        assert (await controller.finish("rest")).finish_reason is FinishReason.LENGTH
        assert controller.tokens("rest", start=12) == whole[12:]
        logprobs = [entry for output in controller.outputs if output.request_id == "whole" for entry in output.logprobs]
        assert [entry.token_id for entry in logprobs] == whole
        await controller.submit("another", max_tokens=30, temperature=temperature, seed=12)
        await controller.finish("another")
        assert (controller.tokens("another") == whole) == (temperature == 0.0)


async def test_an_end_token_stops(start_worker: StartWorker) -> None:
    async with session(start_worker()) as controller:
        await controller.submit("a", max_tokens=20)
        await controller.finish("a")
        end = controller.tokens("a")[7]
        await controller.submit("b", max_tokens=20, end_token_ids=(end,))
        assert (await controller.finish("b")).finish_reason is FinishReason.STOP
    assert controller.tokens("b") == controller.tokens("a")[: controller.tokens("a").index(end) + 1]


async def test_an_abort_frees_the_blocks_within_two_steps(start_worker: StartWorker) -> None:
    async with session(start_worker()) as controller:
        await controller.submit("a", max_tokens=400, prompt=list(range(60)))
        await controller.receive_until(lambda s: len(s.steps) >= 3)
        await controller.send(aborts=[worker_pb2.Abort(request_id="a")])
        assert (await controller.finish("a")).finish_reason is FinishReason.ABORT
        ended_at = controller.steps[-1]
        await controller.receive_until(lambda s: s.load.num_used_blocks == 0)
    assert controller.steps[-1] <= ended_at + 2


async def test_a_deadline_ends_a_request_and_keeps_its_tokens(start_worker: StartWorker) -> None:
    async with session(start_worker()) as controller:
        await controller.submit("a", max_tokens=400, deadline_ms=60.0)
        assert (await controller.finish("a")).finish_reason is FinishReason.DEADLINE
        await controller.submit("undisturbed", max_tokens=400)
        await controller.finish("undisturbed")
    tokens = controller.tokens("a")
    assert 0 < len(tokens) < 400
    assert tokens == controller.tokens("undisturbed")[: len(tokens)]


async def test_a_request_that_is_known_is_not_run_again(start_worker: StartWorker) -> None:
    async with session(start_worker()) as controller:
        for _ in range(2):
            await controller.submit("a", max_tokens=3)
        await controller.finish("a")
        await controller.submit("a", max_tokens=3)  # ended, not acknowledged
        await controller.submit("b", max_tokens=3)
        await controller.finish("b")
    assert len(controller.tokens("a")) == 3


async def test_what_can_never_run_is_answered(start_worker: StartWorker) -> None:
    async with session(start_worker()) as controller:
        await controller.submit("long", prompt=[1] * MAX_MODEL_LEN)
        await controller.submit("strange", prompt=[100_000])
        for request_id, reason in (("long", "leave no room"), ("strange", "outside the vocabulary")):
            refused = await controller.finish(request_id)
            assert refused.finish_reason is FinishReason.ABORT
            assert reason in refused.error


async def test_cache_events_say_what_the_snapshot_says_and_prefixes_are_found(start_worker: StartWorker) -> None:
    address, prompt = start_worker(num_kv_blocks=32), list(range(40))
    async with open_channel(address) as channel, session(address) as controller:
        stub = worker_pb2_grpc.WorkerStub(channel)
        await controller.submit("a", prompt=prompt, max_tokens=1)
        assert (await controller.finish("a")).cached_tokens == 0
        hashes = block_hashes(prompt, 16, parent=root_hash())
        assert controller.kv_events == [BlockStored(hashes[0], root_hash()), BlockStored(hashes[1], hashes[0])]
        await controller.submit("b", prompt=prompt, max_tokens=1)
        assert (await controller.finish("b")).cached_tokens == 32
        for number in range(6):  # more than the cache holds
            await controller.submit(f"other-{number}", prompt=[60 + number] * 120, max_tokens=1)
            await controller.finish(f"other-{number}")
        snapshot = await stub.Snapshot(worker_pb2.SnapshotRequest(), timeout=10)
    held: set[bytes] = set()
    for event in controller.kv_events:
        held.symmetric_difference_update({event.block_hash})
    assert any(isinstance(event, BlockRemoved) for event in controller.kv_events)
    assert set(snapshot.block_hashes) == held
    assert snapshot.next_event_id == controller.next_event_id
    assert snapshot.step_id == controller.steps[-1]
    assert snapshot.epoch == 3
    assert list(snapshot.requests) == []


async def test_preempted_requests_go_on_where_they_were(start_worker: StartWorker) -> None:
    async with session(start_worker(num_kv_blocks=16)) as controller:
        prompts = {f"r{number}": [number + 1] * 30 for number in range(4)}
        for request_id, prompt in prompts.items():
            await controller.submit(request_id, prompt=prompt, max_tokens=60)
        for request_id in prompts:
            await controller.finish(request_id)
        assert controller.load.num_preemptions > 0
        for request_id, prompt in prompts.items():
            await controller.submit(f"{request_id} alone", prompt=prompt, max_tokens=60)
            await controller.finish(f"{request_id} alone")
            assert controller.tokens(request_id) == controller.tokens(f"{request_id} alone")


async def test_drain_waits_for_the_running_and_refuses_the_new(start_worker: StartWorker) -> None:
    address = start_worker()
    async with open_channel(address) as channel, session(address) as controller:
        stub = worker_pb2_grpc.WorkerStub(channel)
        await controller.submit("a", max_tokens=400)
        await controller.receive_until(lambda s: len(s.steps) > 0)
        assert (await stub.Drain(worker_pb2.DrainRequest(), timeout=0.15)).num_left == 1
        drained = asyncio.ensure_future(stub.Drain(worker_pb2.DrainRequest(), timeout=10))
        await controller.finish("a")
        assert (await drained).num_left == 0
        await controller.submit("b")
        assert "draining" in (await controller.finish("b")).error
        assert len(controller.tokens("a")) == 400


async def test_a_controller_that_does_not_follow_pauses_the_engine(start_worker: StartWorker) -> None:
    address = start_worker(ServerLimits(heartbeat_interval_s=0.05, pause_bytes=3000, resume_bytes=1000))
    async with session(address) as controller:
        await controller.submit("whole", max_tokens=150)
        await controller.submit("unwanted", max_tokens=150)
        await controller.receive_until(lambda s: bool(s.heartbeats) and s.heartbeats[-1].phase == "paused")
        num_steps, spent_s = len(controller.steps), controller.heartbeats[-1].paused_s
        await controller.submit("late", max_tokens=150, deadline_ms=100.0)
        await controller.send(aborts=[worker_pb2.Abort(request_id="unwanted")])
        assert (await controller.finish("unwanted")).finish_reason is FinishReason.ABORT
        assert (await controller.finish("late")).finish_reason is FinishReason.DEADLINE
        await controller.receive_until(lambda s: s.heartbeats[-1].paused_s > spent_s)
        assert len(controller.steps) <= num_steps + 4, "two in flight and the two that ended"
        assert not controller.heartbeats[-1].busy
        while not any(output.request_id == "whole" and output.finish_reason for output in controller.outputs):
            await controller.send(ack=worker_pb2.Ack(step_id=controller.steps[-1]))
            seen = len(controller.outputs)
            await controller.receive_until(lambda s, seen=seen: len(s.outputs) > seen)
        await controller.send(ack=worker_pb2.Ack(step_id=controller.steps[-1]))
        await controller.receive_until(lambda s: s.heartbeats[-1].phase == "idle")
        await controller.submit("undisturbed", max_tokens=30)
        await controller.finish("undisturbed")
    assert len(controller.tokens("whole")) == 150
    assert controller.tokens("whole")[:30] == controller.tokens("undisturbed")


async def test_heartbeats_come_with_and_without_work(start_worker: StartWorker) -> None:
    async with session(start_worker()) as controller:
        await controller.receive_until(lambda s: len(s.heartbeats) >= 2)
        assert not controller.heartbeats[-1].busy
        await controller.submit("a", max_tokens=400)
        await controller.receive_until(lambda s: s.heartbeats[-1].busy and s.heartbeats[-1].load.num_running == 1)
        assert not controller.heartbeats[-1].failed


@pytest.mark.parametrize("start_worker", ["timed"], indirect=True)
async def test_without_a_model_tokens_follow_from_the_rule_and_steps_take_their_time(start_worker: StartWorker) -> None:
    async with session(start_worker()) as controller:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        await controller.submit("a", max_tokens=50)
        await controller.finish("a")
        spent_ms = (loop.time() - start_s) * 1e3
    assert controller.tokens("a") == expected_tokens(PROMPT, 50)
    # A lower bound, which a loaded machine cannot break: the runner sleeps for what the model says.
    assert spent_ms > 50 * QWEN3_8B_H200.step_ms(num_decoding=1, num_prefill_tokens=0)
    assert max(controller.tokens("a")) < VOCAB_SIZE


def test_steps_take_what_was_measured() -> None:
    step_ms = QWEN3_8B_H200.step_ms
    assert step_ms(num_decoding=8, num_prefill_tokens=0) == 4.69
    assert step_ms(num_decoding=80, num_prefill_tokens=0) == pytest.approx((5.37 + 8.96) / 2)
    assert step_ms(num_decoding=224, num_prefill_tokens=0) == pytest.approx(8.96 + 8.96 - 5.37)
    assert step_ms(num_decoding=0, num_prefill_tokens=65_536) == pytest.approx(1490)
    assert step_ms(num_decoding=0, num_prefill_tokens=16) == 4.10
    assert step_ms(num_decoding=8, num_prefill_tokens=65_536) == pytest.approx(1490 + 0.59)
    assert QWEN3_8B_H200.scaled(2.0).step_ms(num_decoding=8, num_prefill_tokens=0) == pytest.approx(9.38)


def test_a_replica_without_a_model_needs_a_number_of_blocks() -> None:
    with pytest.raises(ConfigError, match="num_kv_blocks"):
        TimedReplica()(ModelConfig(model="any"), EngineConfig())


def wild_submit(rng: random.Random, request_id: str) -> worker_pb2.Submit:
    """Fields that no controller sends, one to four at a time, on a request that could run."""
    floats = (math.nan, math.inf, -math.inf, -1.0, 0.0, 3e38, 5e-324)
    ints = (-(2**31), -1, 0, 1, 2**31 - 1)
    submit = worker_pb2.Submit(request_id=request_id, prompt_token_ids=PROMPT)
    submit.sampling.MergeFrom(worker_pb2.TokenSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=4))
    for _ in range(rng.randint(1, 4)):
        field = rng.choice(worker_pb2.TokenSampling.DESCRIPTOR.fields)
        match field.name:
            case "logit_bias":
                submit.sampling.logit_bias[rng.choice(ints)] = rng.choice(floats)
            case "bad_words":
                submit.sampling.bad_words.add(token_ids=rng.choices(ints, k=rng.randint(0, 2)))
            case "end_token_ids":
                submit.sampling.end_token_ids.append(rng.choice(ints))
            case name:
                values = floats if field.type == field.TYPE_DOUBLE else ints
                setattr(submit.sampling, name, rng.choice(values))
        match rng.randrange(8):
            case 0:
                submit.prompt_token_ids[:] = rng.choices(ints, k=rng.choice((0, 1, 700)))
            case 1:
                submit.output_token_ids[:] = rng.choices(ints, k=rng.choice((1, 9)))
            case 2:
                submit.deadline_ms = rng.choice(floats)
            case 3:
                submit.tenant, submit.tenant_weight = "x", rng.choice(floats)
            case 4:
                submit.priority, submit.salt = rng.choice(ints), rng.randbytes(rng.choice((1, 100)))
    return submit


async def test_submits_that_no_controller_sends_harm_nobody(start_worker: StartWorker) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    async with session(start_worker()) as controller:
        await controller.submit("alone", max_tokens=100)
        await controller.finish("alone")
        await controller.submit("beside", max_tokens=100)
        for number in range(60):
            submit = wild_submit(rng, f"wild-{number}")
            await controller.send(submits=[submit])
            try:
                await controller.finish(submit.request_id)
            except TimeoutError:
                raise AssertionError(f"no answer to {submit}") from None
        await controller.finish("beside")
        assert controller.tokens("beside") == controller.tokens("alone")
        await controller.receive_until(lambda s: s.load.num_used_blocks == 0 and s.load.num_running == 0)
