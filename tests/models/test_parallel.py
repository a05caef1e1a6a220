"""Tensor parallelism over threads: every rank of 2 or 3 gives the logits of transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotfish.common.errors import ModelLoadError
from pilotfish.models.build import load_model
from pilotfish.models.check import CheckRow, choose_prompts, compare, run_reference
from pilotfish.models.parallel import Parallel, Share
from transformers import PreTrainedModel

TIMEOUT_S = 60


class ThreadGroup:
    """Collectives between the threads of one process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.values: list[torch.Tensor] = [torch.empty(0)] * size

    def parallel(self, rank: int) -> Parallel:
        def exchange(x: torch.Tensor, join: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
            self.values[rank] = x
            self.barrier.wait()
            result = join(self.values)
            self.barrier.wait()
            return result

        return Parallel(
            rank=rank,
            size=self.size,
            all_reduce=lambda x: exchange(x, lambda values: torch.stack(values).sum(0)),
            all_gather=lambda x: exchange(x, lambda values: torch.cat(values, dim=-1)),
        )


@pytest.mark.parametrize(
    ("size", "architecture", "config"),
    [
        (3, "LlamaForCausalLM", {"tie_word_embeddings": True}),
        (2, "LlamaForCausalLM", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
        (3, "Qwen2ForCausalLM", {"num_key_value_heads": 1}),
        (3, "Qwen3MoeForCausalLM", {"attention_bias": True, "decoder_sparse_step": 2}),
        (3, "Qwen2MoeForCausalLM", {}),
        (3, "DeepseekV2ForCausalLM", {"q_lora_rank": None, "v_head_dim": 9}),
        (2, "DeepseekV3ForCausalLM", {"attention_bias": True}),
        (3, "GptOssForCausalLM", {}),
        (3, "Glm4MoeForCausalLM", {"use_qk_norm": True, "attention_bias": True}),
        (2, "MixtralForCausalLM", {"num_key_value_heads": 2, "save": {"save_original_format": False}}),
    ],
)
def test_ranks_agree_with_transformers(
    size: int, architecture: str, config: dict[str, Any], tmp_path: Path, save_checkpoint: Callable[..., PreTrainedModel]
) -> None:
    untouched = save_checkpoint(tmp_path, architecture, **config)
    references = [run_reference(untouched, prompt) for prompt in choose_prompts(load_model(tmp_path, device="cpu"), seed=0)]
    group = ThreadGroup(size)

    def run_rank(rank: int) -> list[CheckRow]:
        try:
            return compare(load_model(tmp_path, device="cpu", parallel=group.parallel(rank)), references)
        except BaseException:
            group.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        for rows in pool.map(run_rank, range(size), timeout=TIMEOUT_S):
            assert all(row.ok for row in rows), rows


def test_heads_that_do_not_divide_are_refused(llama: Path) -> None:
    with pytest.raises(ModelLoadError, match="attention heads 6 cannot be split over 4 ranks"):
        load_model(llama, device="cpu", parallel=ThreadGroup(4).parallel(0))
    with pytest.raises(ModelLoadError, match="key/value heads 3 cannot be split over 2 ranks"):
        load_model(llama, device="cpu", parallel=ThreadGroup(2).parallel(0))


def test_fewer_kv_heads_than_ranks_are_repeated() -> None:
    group = ThreadGroup(6)
    shares = [group.parallel(rank).kv_head_share(3, unit=10) for rank in range(6)]
    assert shares == [Share(start, start + 10, 30) for start in (0, 0, 10, 10, 20, 20)]


def test_vocabulary_is_covered_once() -> None:
    for size, vocab_size in ((3, 131), (4, 5), (2, 8)):
        shares = [ThreadGroup(size).parallel(rank).vocab_share(vocab_size) for rank in range(size)]
        assert [index for share in shares for index in range(share.start, share.stop)] == list(range(vocab_size))


def test_a_rank_outside_its_group_or_without_collectives() -> None:
    with pytest.raises(ValueError, match="rank 1 must be in"):
        Parallel(rank=1, size=1)
    with pytest.raises(ValueError, match="2 ranks need"):
        Parallel(rank=1, size=2)
