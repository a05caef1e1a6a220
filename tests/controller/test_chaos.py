"""Nothing is lost: streams of real processes that are killed, stopped and cut off, compared with an undisturbed run.

PILOTFISH_CHAOS_SEED is another schedule.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from chaos_faults import KINDS, RESTART, Fault, inflict, schedule
from chaos_host import PRELOADED, ChaosHost
from chaos_load import Load, Tally, make_requests
from chaos_processes import Settings
from openai import AsyncOpenAI, UnprocessableEntityError
from pilotfish.client import AsyncClient
from pilotfish.common.cluster_state import ReplicaState
from pilotfish.common.config import EngineConfig, FleetConfig
from pilotfish.common.errors import PoisonousRequest
from pilotfish.models.config_fields import read_fields
from pilotfish.models.store import resolve
from pilotfish.workers.timed_runner import TimingModel
from process_size import ProcessSize
from reading import eventually
from zygote import Child, Zygote

SEED = int(os.environ.get("PILOTFISH_CHAOS_SEED", "5"))
NUM_REPLICAS, NUM_CLIENTS = 3, 8
LIMIT_S = 120.0  # for streams under way to end, once nothing disturbs them
# Workers die so often here that a stream gets a token or two between two deaths: that is no request's fault.
FLEET = FleetConfig(num_replicas=NUM_REPLICAS, heartbeat_timeout_s=1.5, max_attempts=1000, max_restarts=1000)
LONGEST_S = 3.0  # of a stop or a silence: the longer half of the long ones costs the worker
# Who computes may be silent for longer, on a machine that does other things too.
REAL_FLEET, REAL_LONGEST_S = replace(FLEET, heartbeat_timeout_s=4.0), 7.0
TOPICS = ("the sea", "a fox", "two towers", "winter", "bread", "a lighthouse", "the moon", "chess")

pytestmark = pytest.mark.timeout(600)  # on a machine that does much else

RecordProperty = Callable[[str, object], None]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    mother = Zygote(PRELOADED)
    yield mother
    mother.close()


def timed_settings(model_path: Path) -> Settings:
    return Settings(
        model_path=str(model_path),
        engine=EngineConfig(device="cpu", max_num_seqs=32, num_kv_blocks=2000),
        fleet=FLEET,
        timing=TimingModel(decode_ms=((1, 25.0), (32, 35.0)), prefill_ms_per_token=0.02),
    )


def real_settings() -> Settings:
    model_path = resolve("smollm2-135m", allow_download=False).path
    read_fields(model_path / "config.json")  # once here, so that no worker needs transformers
    engine = EngineConfig(device="cpu", max_num_seqs=32, num_kv_blocks=600, num_threads=1)
    return Settings(model_path=str(model_path), engine=engine, fleet=REAL_FLEET)


def stories(number: int) -> list[str]:
    return [f"Number {i} of the stories about {TOPICS[i % len(TOPICS)]}: once upon a time" for i in range(number)]


async def disturb(host: ChaosHost, load: Load, faults: Sequence[Fault]) -> tuple[Counter[str], Tally]:
    """Inflict the faults while the answers are read again and again."""
    over = asyncio.Event()
    reading = asyncio.create_task(load.read(over, limit_s=LIMIT_S))
    try:
        happened = await inflict(host, faults, num_received=lambda: load.num_received)
    finally:
        over.set()
        tally = await reading
    return happened, tally


def check(record_property: RecordProperty, happened: Counter[str], tally: Tally, *, num_faults: int) -> None:
    kinds = ", ".join(f"{number} x {kind}" for kind, number in sorted(happened.items()))
    figures = f"seed {SEED}: {happened.total()} faults ({kinds}); {tally}"
    record_property("figures", figures)
    assert tally.is_clean, "\n".join([figures, *tally.wrong[:20]])
    assert happened.total() == num_faults


async def test_200_faults_cost_no_token(
    zygote: Zygote, tokenizer_path: Path, tmp_path: Path, record_property: RecordProperty
) -> None:
    dice = random.Random(SEED)
    prefix = [dice.randrange(97) for _ in range(40)]
    prompts = [[*prefix[: dice.choice([0, 16, 40])], *(dice.randrange(97) for _ in range(10))] for _ in range(48)]
    faults = schedule(SEED, num_faults=200, interval_tokens=50, longest_s=LONGEST_S)
    async with ChaosHost(timed_settings(tokenizer_path), tmp_path, zygote=zygote, num_doors=NUM_CLIENTS) as host:
        await host.wait_serving(NUM_REPLICAS)
        async with Load(host.doors, make_requests(prompts, seed=SEED, max_tokens=(60, 120))) as load:
            await load.learn()
            happened, tally = await disturb(host, load, faults)
    check(record_property, happened, tally, num_faults=200)


async def test_a_dozen_faults_cost_a_real_model_no_token(
    zygote: Zygote, tmp_path: Path, record_property: RecordProperty
) -> None:
    """What a replica computes again says the same."""
    faults = schedule(SEED, num_faults=12, interval_tokens=25, longest_s=REAL_LONGEST_S)
    async with ChaosHost(real_settings(), tmp_path, zygote=zygote, num_doors=NUM_CLIENTS) as host:
        await host.wait_serving(NUM_REPLICAS)
        async with Load(host.doors, make_requests(stories(12), seed=SEED, max_tokens=(12, 20))) as load:
            await load.learn()
            happened, tally = await disturb(host, load, faults)
    check(record_property, happened, tally, num_faults=12)


async def test_streamed_chats_over_http_outlive_their_workers(zygote: Zygote, tokenizer_path: Path, tmp_path: Path) -> None:
    """One worker is killed, the next one stopped until its replica counts as lost."""
    settings = replace(timed_settings(tokenizer_path), fleet=replace(FLEET, num_replicas=2))

    async def chat(client: AsyncOpenAI, number: int, seen: Counter[int]) -> tuple[str, str | None, int]:
        text, reason, num_tokens = "", None, 0
        stream = await client.chat.completions.create(
            model="chaos",
            messages=[{"role": "user", "content": f"story {number}"}],
            max_tokens=120,
            temperature=number % 2,
            seed=number,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            seen[number] += 1
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                text, reason = text + (choice.delta.content or ""), choice.finish_reason
        return text, reason, num_tokens

    async with (
        ChaosHost(settings, tmp_path, zygote=zygote, num_doors=0) as host,
        AsyncOpenAI(base_url=f"http://{host.http_door}/v1", api_key="none", max_retries=0, timeout=240) as client,
    ):
        await host.wait_serving(2)
        undisturbed = await asyncio.gather(*(chat(client, number, Counter()) for number in range(8)))
        seen = Counter[int]()
        reading = [asyncio.create_task(chat(client, number, seen)) for number in range(8)]
        for num_chunks, hurt in ((10, Child.kill), (40, Child.stop)):
            await eventually(lambda least=num_chunks: len(seen) == 8 and min(seen.values()) >= least)
            hurt(host.serving[0].process)
        assert await asyncio.gather(*reading) == undisturbed
        assert host.num_launched >= 4
    assert {num_tokens for _, _, num_tokens in undisturbed} == {120}


async def test_poisonous_requests_end_and_take_nobody_along(zygote: Zygote, tokenizer_path: Path, tmp_path: Path) -> None:
    """Two, over either door, each of which kills every worker that runs it; the fleet has its usual limits."""
    poison = 96
    fleet = FleetConfig(num_replicas=NUM_REPLICAS)
    settings = replace(timed_settings(tokenizer_path), fleet=fleet, poison=poison)
    prompts = [[number, 1, 2] for number in range(24)]
    async with ChaosHost(settings, tmp_path, zygote=zygote, num_doors=1) as host:
        await host.wait_serving(NUM_REPLICAS)
        async with (
            Load(host.doors, make_requests(prompts, seed=SEED, max_tokens=(60, 120))) as load,
            AsyncClient(host.doors[0], timeout_s=LIMIT_S) as client,
            AsyncOpenAI(base_url=f"http://{host.http_door}/v1", api_key="none") as http,
        ):
            await load.learn()
            over = asyncio.Event()
            reading = asyncio.create_task(load.read(over, limit_s=LIMIT_S))
            ends = await asyncio.gather(
                client.generate([poison, 1], max_tokens=20, ignore_eos=True),
                http.completions.create(model="chaos", prompt=[poison, 2], max_tokens=20, extra_body={"ignore_eos": True}),
                return_exceptions=True,
            )
            over.set()
            tally = await reading
            state = await client.status()
    assert tally.is_clean, "\n".join(tally.wrong[:20])
    assert isinstance(ends[0], PoisonousRequest)
    assert "3 replicas in a row when they died" in ends[0].message
    assert isinstance(ends[1], UnprocessableEntityError)
    assert ends[1].code == "poisonous_request"
    most = 2 * 2 * fleet.max_attempts  # replicas that one of them kills are a reason to doubt the other's guilt
    assert 3 <= host.num_launched - NUM_REPLICAS <= most
    assert ReplicaState.FAILED not in {replica.state for replica in state.replicas}


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_soak(zygote: Zygote, tmp_path: Path, record_property: RecordProperty) -> None:
    """200 faults on the real model (make soak). Over the second half one controller lives, and does not grow."""
    first = schedule(SEED, num_faults=100, interval_tokens=40, longest_s=REAL_LONGEST_S)
    others = {kind: part for kind, part in KINDS.items() if kind != RESTART}
    second = schedule(SEED + 1, num_faults=100, interval_tokens=40, longest_s=REAL_LONGEST_S, parts=others)
    async with ChaosHost(real_settings(), tmp_path, zygote=zygote, num_doors=NUM_CLIENTS) as host:
        await host.wait_serving(NUM_REPLICAS)
        async with Load(host.doors, make_requests(stories(64), seed=SEED, max_tokens=(16, 32))) as load:
            await load.learn()
            happened, tally = await disturb(host, load, first)
            assert host.controller is not None
            pids = {"controller": host.controller.pid, "clients": os.getpid()}
            before = {name: ProcessSize.of(pid) for name, pid in pids.items()}
            more_happened, more = await disturb(host, load, second)
            after = {name: ProcessSize.of(pid) for name, pid in pids.items()}
    record_property("figures", "; ".join(f"{name} {before[name]}, after 100 more faults {after[name]}" for name in pids))
    check(record_property, happened + more_happened, tally + more, num_faults=200)
    for name in pids:
        after[name].check_no_larger_than(before[name])
