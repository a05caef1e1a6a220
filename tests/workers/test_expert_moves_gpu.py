"""Experts that move between two GPUs, under CUDA graphs: text is that of one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_replica import Told
from pilotfish.common.config import EngineConfig, ModelConfig, ParallelConfig
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.workers.engine import Engine, SetUp
from pilotfish.workers.local_replica import LocalReplica

pytestmark = [pytest.mark.gpu2, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]

NUM_REQUESTS, NUM_TOKENS = 5, 120


def run(path: Path, *, cuda_graphs: bool, set_up: SetUp | None = None) -> Told:
    told = Told()
    config = EngineConfig(device="cuda", num_kv_blocks=128, max_num_seqs=8, cuda_graphs=cuda_graphs)
    engine = Engine(ModelConfig(model=str(path), dtype="float32"), config, on_step=told, set_up=set_up)
    engine.start()
    try:
        for index in range(NUM_REQUESTS):
            sampling = TokenSampling(temperature=0.0, max_tokens=NUM_TOKENS, seed=index)
            prompt = tuple(range(7 * index, 7 * index + 20))
            engine.submit(EngineRequest(request_id=f"r{index}", prompt_token_ids=prompt, sampling=sampling))
        told.wait(num_ended=NUM_REQUESTS)
    finally:
        engine.stop()
    return told


@pytest.mark.parametrize("num_redundant", [0, 4])
@pytest.mark.parametrize(("tensor_size", "data_size"), [(2, 1), (1, 2)], ids=["tensor ranks", "data ranks"])
def test_text_stays_as_it_is_while_experts_move_under_graphs(
    tiny_mixtral: Path, num_redundant: int, tensor_size: int, data_size: int
) -> None:
    """Of data ranks the second serves experts alone."""
    parallel = ParallelConfig(
        tensor_parallel=tensor_size,
        data_parallel=data_size,
        expert_parallel=True,
        redundant_experts=num_redundant,
        rebalance_interval_steps=4,
    )
    ranks = run(tiny_mixtral, cuda_graphs=True, set_up=LocalReplica(parallel, on_step=lambda *_: None))
    assert ranks.tokens == run(tiny_mixtral, cuda_graphs=False).tokens
    assert len({balance.num_moves for balance in ranks.balances if balance is not None}) >= 5
