"""Data ranks that share experts, each with requests of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import data_rank_work
import pytest
import torch
from data_replica import Told, data_replica, run_alone
from function_recorder import FunctionRecorder
from pilotfish.common.config import ModelConfig, ParallelConfig
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.models.layers import expert_dispatch
from pilotfish.workers.engine import Engine, Phase
from pilotfish.workers.local_replica import LocalReplica
from pilotfish.workers.model_runner import ModelRunner
from processes import children_end
from rank_group_run import run_on_ranks
from rank_process import ENGINE
from small_model import save_for_workers
from transformers import MixtralConfig, MixtralForCausalLM
from upcycled import upcycle

LOUD = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "logprobs": 2, "logit_bias": {5: 1.0}}
SAMPLING = [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 40}, LOUD]


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With logits far apart; 5 experts, which 2 or 4 ranks do not share evenly."""
    path = tmp_path_factory.mktemp("tiny_moe")
    torch.manual_seed(20)
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return save_for_workers(MixtralForCausalLM(config).to(torch.float32), path)


def requests(rank: int, number: int, *, max_tokens: int = 12) -> list[EngineRequest]:
    """Prompts of 3 to 60 tokens; every data rank has others."""
    return [
        EngineRequest(
            request_id=f"rank-{rank}-{index}",
            prompt_token_ids=tuple((7 * rank + 5 * token + index) % 320 for token in range(3 + 19 * (index % 4))),
            sampling=TokenSampling(**SAMPLING[index % len(SAMPLING)], max_tokens=max_tokens + index, seed=10 * rank + index),
        )
        for index in range(number)
    ]


def submit(engine: Engine, batch: Sequence[EngineRequest]) -> None:
    for request in batch:
        engine.submit(request)


def dispatch_steps(data_size: int) -> list[data_rank_work.Step]:
    """Ragged, one token each, ranks that keep no chosen expert, and more tokens than are gathered."""
    rank_tokens = [(5, 17, 1), (1, 1, 1), (300, 2, 40), (3, 257, 3)]
    return [(tokens[:data_size], routing) for tokens in rank_tokens for routing in data_rank_work.ROUTING]


def check_dispatch(ranks: list[list[dict[str, float]]], steps: list[data_rank_work.Step], tolerance: float) -> None:
    for number, errors in enumerate(ranks):
        for step, error in zip(steps, errors, strict=True):
            assert max(error.values()) < tolerance, (number, step, error)


@pytest.mark.parametrize(("tensor_size", "data_size", "num_slots"), [(1, 2, 8), (1, 3, 7), (2, 2, 9)])
def test_dispatchers_equal_all_experts_in_one_place(tensor_size: int, data_size: int, num_slots: int) -> None:
    steps = dispatch_steps(data_size)
    arguments = (tensor_size, data_rank_work.dispatch, num_slots, steps)
    check_dispatch(run_on_ranks(*arguments, device_type="cpu", data_size=data_size), steps, 1e-4)


@pytest.mark.gpu2
def test_dispatchers_equal_all_experts_in_one_place_on_gpus() -> None:
    steps = dispatch_steps(2)
    check_dispatch(run_on_ranks(1, data_rank_work.dispatch, 8, steps, device_type="cuda", data_size=2), steps, 0.06)


@pytest.mark.gpu2
@pytest.mark.parametrize("num_tokens", [1, 8, 96])
def test_a_graph_of_a_dispatch_serves_other_tokens(num_tokens: int) -> None:
    arguments = (1, data_rank_work.replay_a_dispatch, 8, num_tokens)
    assert max(run_on_ranks(*arguments, device_type="cuda", data_size=2)) < 0.06


@pytest.mark.parametrize(
    ("data_size", "tensor_size", "in_flight", "most_gathered"), [(2, 1, 1, 16), (2, 1, 2, 512), (4, 1, 1, 32), (2, 2, 1, 512)]
)
def test_data_ranks_say_what_one_engine_says(
    tiny_moe: Path, monkeypatch: pytest.MonkeyPatch, data_size: int, tensor_size: int, in_flight: int, most_gathered: int
) -> None:
    """Uneven batches of every kind of sampling, prefill beside others' decode, and the second rank mostly idle."""
    monkeypatch.setattr(expert_dispatch, "MAX_GATHERED_ROWS", most_gathered)
    batches = [requests(rank, number) for rank, number in enumerate((6, 0, 1, 3)[:data_size])]
    late = [requests(10 + rank, 2) for rank in range(data_size)]
    alone = run_alone(tiny_moe, [request for batch in (*batches, *late) for request in batch])
    options = {"data_size": data_size, "tensor_size": tensor_size, "max_steps_in_flight": in_flight}
    with data_replica(tiny_moe, **options) as (engines, told):
        for engine, batch in zip(engines, batches, strict=True):
            submit(engine, batch)
        told[0].wait(num_tokens=3)
        for engine, batch in zip(engines, late, strict=True):
            submit(engine, batch)
        for rank, batch in enumerate(batches):
            told[rank].wait(num_ended=len(batch) + 2)
            assert engines[rank].health().ok
    assert {name: tokens for one in told for name, tokens in one.tokens.items()} == alone


@pytest.mark.parametrize("in_flight", [1, 2])
def test_data_ranks_replay_graphs_of_one_size(tiny_moe: Path, in_flight: int) -> None:
    """Decode steps and steps with prompts, as functions instead of graphs; the second rank has padding alone, then more."""
    first, second = requests(0, 5), requests(1, 3)
    alone = run_alone(tiny_moe, [*first, *second])
    recorders: list[FunctionRecorder] = []

    def record(runner: ModelRunner) -> None:
        recorders.append(FunctionRecorder())
        runner.use_graphs([1, 2, 4, 8], [16, 64, 96], recorder=recorders[-1])

    with data_replica(tiny_moe, data_size=2, max_steps_in_flight=in_flight, prepare=record) as (engines, told):
        submit(engines[0], first)
        told[0].wait(num_tokens=12)
        submit(engines[1], second)
        told[0].wait(num_ended=5)
        told[1].wait(num_ended=3)
    assert told[0].tokens | told[1].tokens == alone
    assert all(len(recorder.replayed) > 10 for recorder in recorders)


def test_an_idle_replica_answers_soon_and_stops(tiny_moe: Path) -> None:
    """A turn of leaders that have nothing to do is short, whichever gets the next request; one that stops ends all."""
    with data_replica(tiny_moe, data_size=2) as (engines, told):
        for rank in (1, 0, 1):
            time.sleep(0.2)
            assert [engine.health().phase for engine in engines] == [Phase.IDLE] * 2
            num_ended = len(told[rank].ended)
            submit(engines[rank], requests(20 + 3 * num_ended + rank, 1))
            told[rank].wait(num_ended=num_ended + 1)
        engines[0].stop()
        assert wait_for_failure(engines[1]) == "data rank 0 of this replica was stopped, and the others with it"


@pytest.mark.parametrize(("end", "what"), [(signal.SIGKILL, "ended"), (signal.SIGSTOP, "rank 1 on 127.0.0.1 has been silent")])
def test_a_data_rank_that_dies_or_stands_still_ends_all(tiny_moe: Path, end: signal.Signals, what: str) -> None:
    """An idle one too: the experts of both are needed for the requests of either."""
    told = Told()
    replica = LocalReplica(ParallelConfig(data_parallel=2, expert_parallel=True), on_step=lambda rank, step: None)
    engine = Engine(ModelConfig(model=str(tiny_moe)), ENGINE, on_step=told, set_up=replica)
    engine.start()
    try:
        submit(engine, requests(0, 3, max_tokens=400))
        told.wait(num_tokens=10)
        time.sleep(1)  # for a first beat
        (other,) = multiprocessing.active_children()
        os.kill(other.pid or 0, end)
        assert what in wait_for_failure(engine)
    finally:
        engine.stop()
    assert children_end()


def wait_for_failure(engine: Engine) -> str:
    deadline = time.monotonic() + 20
    while engine.health().phase is not Phase.FAILED and time.monotonic() < deadline:
        time.sleep(0.05)
    return engine.health().message


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_a_real_model_over_data_ranks_says_what_the_dense_one_says(
    short_smollm2_path: Path, tmp_path: Path, tensor_size: int
) -> None:
    """Whatever the routers choose, on whichever of two or four ranks the expert is; each data rank has a prompt."""
    batch = requests(0, 2, max_tokens=4)
    dense = run_alone(short_smollm2_path, batch)
    sparse = upcycle(short_smollm2_path, tmp_path / "moe", num_experts=2 * tensor_size)
    with data_replica(sparse, data_size=2, tensor_size=tensor_size) as (engines, told):
        for engine, request in zip(engines, batch, strict=True):
            submit(engine, [request])
        for one in told:
            one.wait(num_ended=1)
    assert told[0].tokens | told[1].tokens == dense
