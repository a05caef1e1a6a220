"""Tensor parallelism over threads: what each rank keeps, and every rank gives the logits of transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotfish.common.errors import ModelLoadError
from pilotfish.kernels.all_reduce import all_reduce_norm_ref
from pilotfish.models.build import check_ranks, load_model
from pilotfish.models.check import choose_prompts, compare, run_reference
from pilotfish.models.paged_sequences import PagedSequences
from pilotfish.models.parallel import Parallel, Share
from transformers import PreTrainedModel

TIMEOUT_S = 60


class ThreadGroup:
    """Collectives between the threads of one process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.values: list[torch.Tensor] = [torch.empty(0)] * size
        self.num_calls, self.num_fused = [0] * size, [0] * size

    def parallel(self, rank: int, *, fused: bool = False) -> Parallel:
        def exchange(x: torch.Tensor, join: Callable[[list[torch.Tensor]], Any]) -> Any:
            self.num_calls[rank] += 1
            self.values[rank] = x
            self.barrier.wait()
            result = join(self.values)
            self.barrier.wait()
            return result

        def all_reduce_norm(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            self.num_fused[rank] += 1
            return exchange(x, lambda values: all_reduce_norm_ref(values, *args))

        return Parallel(
            rank=rank,
            size=self.size,
            all_reduce=lambda x: exchange(x, lambda values: torch.stack(values).sum(0)),
            all_gather=lambda x: exchange(x, lambda values: torch.cat(values, dim=-1)),
            all_reduce_norm=all_reduce_norm if fused else None,
        )

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What work(rank) returned on each rank."""

        def run_rank(rank: int) -> Any:
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(run_rank, range(self.size), timeout=TIMEOUT_S))


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
        (2, "Qwen3ForCausalLM", {"attention_bias": True}),
        (4, "Qwen3MoeForCausalLM", {"intermediate_size": 100, "moe_intermediate_size": 36}),
    ],
)
def test_ranks_agree_with_transformers(
    size: int, architecture: str, config: dict[str, Any], tmp_path: Path, save_checkpoint: Callable[..., PreTrainedModel]
) -> None:
    untouched = save_checkpoint(tmp_path, architecture, **config)
    references = [run_reference(untouched, prompt) for prompt in choose_prompts(load_model(tmp_path, device="cpu"), seed=0)]
    group = ThreadGroup(size)
    for rows in group.run(lambda rank: compare(load_model(tmp_path, device="cpu", parallel=group.parallel(rank)), references)):
        assert all(row.ok for row in rows), rows


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_every_sum_but_the_embedding_s_is_one_op_with_its_norm(
    architecture: str, tmp_path: Path, save_checkpoint: Callable[..., PreTrainedModel]
) -> None:
    save_checkpoint(tmp_path, architecture)

    def decode(rank: int, group: ThreadGroup, *, fused: bool) -> tuple[torch.Tensor, int]:
        model = load_model(tmp_path, device="cpu", parallel=group.parallel(rank, fused=fused))
        paged = PagedSequences(model, num_sequences=1, max_len=8)
        return torch.cat([paged.extend({0: tokens})[0] for tokens in ([3, 1, 4, 1], [5])]), model.config.num_layers

    apart, together = ThreadGroup(2), ThreadGroup(2)
    expected = apart.run(lambda rank: decode(rank, apart, fused=False))
    answers = together.run(lambda rank: decode(rank, together, fused=True))
    assert together.num_calls == apart.num_calls
    for rank, ((logits, num_layers), (fused_logits, _)) in enumerate(zip(expected, answers, strict=True)):
        assert together.num_fused[rank] == 2 * (2 * num_layers)  # two steps
        assert together.num_calls[rank] - together.num_fused[rank] == 4  # the embedding and the logits
        torch.testing.assert_close(fused_logits, logits, rtol=1e-5, atol=1e-5)


def heads(num_heads: int, num_kv_heads: int, size: int) -> list[tuple[range, range]]:
    """Each rank's query heads and kv heads."""
    ranks = [ThreadGroup(size).parallel(rank) for rank in range(size)]
    shares = [(p.query_head_share(num_heads, num_kv_heads, unit=1), p.kv_head_share(num_kv_heads, unit=1)) for p in ranks]
    return [(range(q.start, q.stop), range(kv.start, kv.stop)) for q, kv in shares]


def test_smollm2_heads_over_any_number_of_ranks() -> None:
    assert heads(9, 3, 2) == [(range(6), range(2)), (range(6, 9), range(2, 3))]
    assert heads(9, 3, 3) == [(range(3 * i, 3 * i + 3), range(i, i + 1)) for i in range(3)]
    assert heads(9, 3, 4) == [
        (range(2), range(1)),
        (range(2, 3), range(1)),
        (range(3, 6), range(1, 2)),
        (range(6, 9), range(2, 3)),
    ]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (32, 8), (14, 2), (28, 4), (5, 1), (7, 7), (64, 8)])
def test_heads_are_dealt_once_and_evenly(num_heads: int, num_kv_heads: int) -> None:
    group = num_heads // num_kv_heads
    for size in range(1, num_heads + 1):
        ranks = heads(num_heads, num_kv_heads, size)
        assert [head for q, _ in ranks for head in q] == list(range(num_heads))
        for q, kv in ranks:
            assert len(q) > 0
            assert len(q) % len(kv) == 0
            # The kernels' rule, query head n reads kv head n // (N / K), holds among this rank's heads.
            assert [kv[n // (len(q) // len(kv))] for n in range(len(q))] == [head // group for head in q]
        assert {head for _, kv in ranks for head in kv} == set(range(num_kv_heads))
        num_kv = [len(kv) for _, kv in ranks]
        assert max(num_kv) - min(num_kv) <= 1
        assert max(num_kv) == max(1, -(-num_kv_heads // size))


def test_more_ranks_than_query_heads_are_refused(llama: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"6 attention heads .* 7 ranks: use at most 6 ranks; 1, 3, 6 share them equally"):
        load_model(llama, device="cpu", parallel=ThreadGroup(7).parallel(0))
    with pytest.raises(ModelLoadError, match="the intermediate size 4 cannot be split over 6 ranks: use at most 4"):
        ThreadGroup(6).parallel(0).share(4, what="the intermediate size", multiple=8)


def shares(total: int, size: int, **options: int) -> list[Share]:
    return [ThreadGroup(size).parallel(rank).share(total, what="it", **options) for rank in range(size)]


def test_shares_are_of_whole_multiples() -> None:
    assert [share.size for share in shares(72, 3, multiple=8)] == [24, 24, 24]
    assert [share.size for share in shares(11008, 3, multiple=8)] == [3672, 3672, 3664]
    assert [share.size for share in shares(100, 3, multiple=8)] == [40, 32, 28]  # the last has what is left over
    assert [share.size for share in shares(36, 7, multiple=8)] == [8, 4, 4, 8, 4, 4, 4]  # five 8s are too few
    assert shares(5, 2, unit=10) == [Share(0, 30, 50), Share(30, 50, 50)]
    for total in range(1, 80):
        for size in range(1, total + 1):
            parts = shares(total, size, multiple=8)
            assert [index for part in parts for index in range(part.start, part.stop)] == list(range(total))
            assert min(part.size for part in parts) > 0


def test_fewer_kv_heads_than_ranks_are_repeated() -> None:
    group = ThreadGroup(6)
    shares = [group.parallel(rank).kv_head_share(3, unit=10) for rank in range(6)]
    assert shares == [Share(start, start + 10, 30) for start in (0, 0, 10, 10, 20, 20)]


def test_a_vocabulary_smaller_than_its_ranks_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="a vocabulary of 12 tokens cannot be split over 4 ranks"):
        ThreadGroup(4).parallel(0).vocab_share(12)


def test_vocabulary_is_covered_once() -> None:
    for size, vocab_size in ((3, 131), (4, 13), (2, 8), (1, 5)):
        shares = [ThreadGroup(size).parallel(rank).vocab_share(vocab_size) for rank in range(size)]
        assert all(share.start % 4 == 0 for share in shares)
        assert [index for share in shares for index in range(share.start, share.stop)] == list(range(vocab_size))


def test_a_rank_outside_its_group_or_without_collectives() -> None:
    with pytest.raises(ValueError, match="rank 1 must be in"):
        Parallel(rank=1, size=1)
    with pytest.raises(ValueError, match="2 ranks need"):
        Parallel(rank=1, size=2)


def test_ranks_are_checked_without_weights(llama: Path) -> None:
    check_ranks(llama, size=3, whole_experts=False)
    with pytest.raises(ModelLoadError, match="use at most 6 ranks"):
        check_ranks(llama, size=7, whole_experts=False)
    with pytest.raises(ModelLoadError, match="no sparse layers"):
        check_ranks(llama, size=2, whole_experts=True)
