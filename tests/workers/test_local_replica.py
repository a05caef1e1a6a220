"""Ranks as processes of this machine: what fails ends all of them, and says why. That they compute right: test_ranks.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench_process import BenchProcess, has_ended
from pilotfish.common.config import EngineConfig, ModelConfig, ParallelConfig
from pilotfish.common.errors import PilotfishError
from pilotfish.workers.engine import Engine
from pilotfish.workers.local_replica import LocalReplica
from processes import children_end

SHAPE = ("--shape", "tiny", "--batch-sizes", "1", "--input-len", "16")
TINY = (*SHAPE, "--device", "cpu", "--output-len", "1000")


@pytest.fixture
def bench() -> Iterator[BenchProcess]:
    with BenchProcess(*TINY) as process:
        yield process


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu2,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
            ],
        ),
    ],
)
def test_at_a_normal_end_nothing_is_complained_of(device: str) -> None:
    with BenchProcess(*SHAPE, "--device", device, "--output-len", "40") as bench:
        assert bench.wait(60) == 0
    for word in ("WARNING", "Warning", "Traceback", "frame #", "TCPStore", "ProcessGroup"):
        assert word not in bench.said, bench.said


def test_a_follower_that_dies_ends_the_leader(bench: BenchProcess) -> None:
    os.kill(bench.follower, signal.SIGKILL)
    assert bench.wait(10) == 1
    assert "pilotfish bench: the engine is failed: rank 1's process ended (exit code -9)" in bench.said


def test_interrupted_all_ranks_end(bench: BenchProcess) -> None:
    follower = bench.follower
    bench.interrupt()
    assert bench.wait(10) == 130
    assert has_ended(follower, timeout_s=1)
    assert "Traceback" not in bench.said


def test_a_leader_that_dies_leaves_no_follower(bench: BenchProcess) -> None:
    follower = bench.follower
    bench.__exit__(None, None, None)
    assert has_ended(follower, timeout_s=10)


def test_a_rank_that_cannot_start_says_why(tmp_path: Path) -> None:
    set_up = LocalReplica(ParallelConfig(tensor_parallel=2))
    config = EngineConfig(device="cpu", num_kv_blocks=8)
    engine = Engine(ModelConfig(model=str(tmp_path / "missing")), config, on_step=lambda step: None, set_up=set_up)
    with pytest.raises(PilotfishError, match="missing"):
        engine.start()
    engine.stop()
    assert children_end()
