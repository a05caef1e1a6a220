"""Nothing is lost: streams of real processes that are killed, stopped and cut off, compared with an undisturbed run.

PILOTFISH_CHAOS_SEED is another schedule.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos_faults import inflict, schedule
from chaos_host import ChaosHost
from chaos_load import Load, make_requests
from chaos_processes import Settings
from pilotfish.common.config import EngineConfig, FleetConfig
from pilotfish.workers.timed_runner import TimingModel

SEED = int(os.environ.get("PILOTFISH_CHAOS_SEED", "5"))
NUM_REPLICAS, NUM_CLIENTS = 3, 8
LIMIT_S = 60.0
LONGEST_S = 3.0  # of a stop or a silence: half of the long ones cost the worker
# Workers die so often here that a request may lose its replica a few times in a row by chance.
FLEET = FleetConfig(num_replicas=NUM_REPLICAS, heartbeat_timeout_s=1.5, max_attempts=10, max_restarts=1000)

RecordProperty = Callable[[str, object], None]


async def test_200_faults_cost_no_token(tokenizer_path: Path, tmp_path: Path, record_property: RecordProperty) -> None:
    dice = random.Random(SEED)
    prefix = [dice.randrange(97) for _ in range(40)]
    prompts = [[*prefix[: dice.choice([0, 16, 40])], *(dice.randrange(97) for _ in range(10))] for _ in range(64)]
    settings = Settings(
        model_path=str(tokenizer_path),
        engine=EngineConfig(device="cpu", max_num_seqs=32, num_kv_blocks=2000),
        fleet=FLEET,
        timing=TimingModel(decode_ms=((1, 25.0), (32, 35.0)), prefill_ms_per_token=0.02),
    )
    faults = schedule(SEED, num_faults=200, interval_tokens=80, longest_s=LONGEST_S)
    async with ChaosHost(settings, tmp_path, num_doors=NUM_CLIENTS) as host:
        await host.wait_serving(NUM_REPLICAS)
        async with Load(host.doors, make_requests(prompts, seed=SEED, max_tokens=(80, 160))) as load:
            await load.learn()
            over = asyncio.Event()
            reading = asyncio.create_task(load.read(over, limit_s=LIMIT_S))
            happened = await inflict(host, faults, num_received=lambda: load.num_received)
            over.set()
            tally = await reading
    figures = f"seed {SEED}: {happened.total()} faults ({', '.join(f'{n} x {kind}' for kind, n in happened.items())}); {tally}"
    record_property("figures", figures)
    assert tally.is_clean, "\n".join([figures, *tally.wrong[:20]])
    assert happened.total() == len(faults)
