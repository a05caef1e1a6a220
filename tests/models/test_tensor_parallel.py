"""Tensor parallelism over real processes, joined by gloo: tiny models of every layer kind, and a real one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_work
from pilotfish.common.errors import ConfigError, ModelNotFound
from pilotfish.models.build import check_ranks, load_model
from pilotfish.models.check import check_model, choose_prompts, run_reference, save_references
from pilotfish.models.local_ranks import RanksFailedError, run_ranks
from pilotfish.models.store import resolve
from pilotfish.scheduler.expert_balancer import first_slots
from transformers import AutoTokenizer, PreTrainedModel
from upcycled import upcycle

TIMEOUT_S = 120
SaveCheckpoint = Callable[..., PreTrainedModel]
MODEL = "smollm2-135m"

# 6 query heads on 3 kv heads and sizes that 2 or 4 ranks do not divide.
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "intermediate_size": 100}),
    ("Qwen3ForCausalLM", {"attention_bias": True}),
    ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 44, "mlp_only_layers": [1]}),
    ("MixtralForCausalLM", {"intermediate_size": 52, "save": {"save_original_format": False}}),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: SaveCheckpoint) -> list[tuple[str, str]]:
    """Each model's directory, and the file of what transformers answers."""
    return [_save(tmp_path_factory.mktemp(name), save_checkpoint, name, config) for name, config in MODELS]


def _save(path: Path, save_checkpoint: SaveCheckpoint, architecture: str, config: dict[str, Any]) -> tuple[str, str]:
    untouched = save_checkpoint(path, architecture, **config)
    prompts = choose_prompts(load_model(path, device="cpu"), seed=0)
    save_references([run_reference(untouched, prompt) for prompt in prompts], path / "references.pt")
    return str(path), str(path / "references.pt")


@pytest.mark.parametrize(("size", "numbers"), [(2, (0, 3)), (3, (0, 2)), (4, (0, 1))])
def test_tiny_models_equal_transformers_on_every_rank(
    size: int, numbers: tuple[int, ...], checkpoints: list[tuple[str, str]]
) -> None:
    """Heads that ranks do not divide, that they divide, and fewer kv heads than ranks; every model below runs on two, too."""
    for models in run_ranks(size, rank_work.compare_all, [checkpoints[n] for n in numbers], timeout_s=TIMEOUT_S):
        assert len(models) == len(numbers)
        for number, rows in zip(numbers, models, strict=True):
            assert len(rows) == 5
            assert all(ok for _, ok, _ in rows), (MODELS[number], rows)


def test_halves_that_hide_their_sums_equal_transformers(checkpoints: list[tuple[str, str]]) -> None:
    for models, num_started in run_ranks(2, rank_work.compare_all_in_halves, checkpoints, timeout_s=TIMEOUT_S):
        for (architecture, _), rows in zip(MODELS, models, strict=True):
            assert all(ok for _, ok, _ in rows), (architecture, rows)
        assert num_started > 8  # every sum but a model's last ones


SPARSE: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 44, "mlp_only_layers": [1]}),
    ("MixtralForCausalLM", {"intermediate_size": 52, "save": {"save_original_format": False}}),
    ("Qwen2MoeForCausalLM", {}),
    ("GptOssForCausalLM", {"intermediate_size": 44}),
]


@pytest.fixture(scope="module")
def sparse_checkpoints(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: SaveCheckpoint) -> list[tuple[str, str]]:
    return [_save(tmp_path_factory.mktemp(name), save_checkpoint, name, config) for name, config in SPARSE]


@pytest.mark.parametrize(("size", "numbers"), [(2, (0, 1, 2, 3)), (3, (2, 3))])
def test_ranks_with_whole_experts_equal_transformers(
    size: int, numbers: tuple[int, ...], sparse_checkpoints: list[tuple[str, str]]
) -> None:
    """Tensors per expert or for all, by rows or columns, with biases; experts that do not divide; a shared expert in slices."""
    work = rank_work.compare_all_with_whole_experts
    for models in run_ranks(size, work, [sparse_checkpoints[n] for n in numbers], timeout_s=TIMEOUT_S):
        for number, rows in zip(numbers, models, strict=True):
            assert all(ok for _, ok, _ in rows), (SPARSE[number], rows)


def test_ranks_that_share_every_expert_add_its_biases_once(sparse_checkpoints: list[tuple[str, str]]) -> None:
    for (rows,) in run_ranks(2, rank_work.compare_all, sparse_checkpoints[-1:], timeout_s=TIMEOUT_S):
        assert all(ok for _, ok, _ in rows), rows


def test_ranks_with_copies_of_experts_equal_transformers(sparse_checkpoints: list[tuple[str, str]]) -> None:
    """Per-expert and fused checkpoints. Each rank reads the experts of its slots, and copies are on ranks of their own."""
    work = rank_work.compare_all_with_copied_experts
    for models in run_ranks(2, work, sparse_checkpoints, 3, timeout_s=TIMEOUT_S):
        for (architecture, _), rows in zip(SPARSE, models, strict=True):
            assert all(ok for _, ok, _ in rows), (architecture, rows)
    for path, _ in sparse_checkpoints:
        ranks = run_ranks(2, rank_work.check_copies, path, 3, timeout_s=TIMEOUT_S)
        for slots in zip(*ranks, strict=True):
            assert [len(set(experts)) for experts in slots] == [4, 4]
            assert set(itertools.chain(*slots)) == set(range(5))


def test_redundant_experts_that_ranks_cannot_share_are_refused(sparse_checkpoints: list[tuple[str, str]]) -> None:
    path, rule = sparse_checkpoints[0][0], partial(first_slots, num_redundant=2, num_ranks=2)
    with pytest.raises(ConfigError, match="use redundant_experts 3"):
        check_ranks(path, size=2, whole_experts=True, first_slots=rule)
    check_ranks(path, size=2, whole_experts=True, first_slots=partial(rule, num_redundant=3))


def test_each_expert_is_kept_once(sparse_checkpoints: list[tuple[str, str]]) -> None:
    path, _ = sparse_checkpoints[0]
    (alone,) = run_ranks(1, rank_work.count_read_experts, path, timeout_s=TIMEOUT_S)
    assert sum(run_ranks(3, rank_work.count_read_experts, path, timeout_s=TIMEOUT_S)) == alone


def test_a_dense_model_has_no_experts_to_share(llama: Path) -> None:
    with pytest.raises(RanksFailedError, match="no sparse layers"):
        run_ranks(2, rank_work.count_read_experts, str(llama), timeout_s=TIMEOUT_S)


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    try:
        return resolve(MODEL, allow_download=False).path
    except ModelNotFound:
        pytest.skip(f"{MODEL} is not set up: run `pilotfish pull {MODEL}`")


def test_smollm2_says_the_same_over_ranks(smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    question = "What is the capital of France? Explain gravity in one sentence."
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    alone = rank_work.decode_greedily(load_model(smollm2_path, device="cpu"), prompt, 9)
    assert tokenizer.decode(alone).startswith("The capital of France is Paris.<|im_end|>")
    for size in (2, 3):
        ranks = run_ranks(size, rank_work.load_and_decode, str(smollm2_path), prompt, 9, timeout_s=TIMEOUT_S)
        assert ranks == [alone] * size


def test_check_model_proves_ranks_too(llama: Path) -> None:
    rows = check_model(llama, tensor_parallel=2)
    assert [row.name for row in rows[5:]] == [f"2 ranks: {row.name.split(': ')[-1]}" for row in rows[:5]]
    assert all(row.ok for row in rows), rows
    *rows, row = check_model(llama, tensor_parallel=7)
    assert all(row.ok for row in rows)
    assert (row.name, row.ok) == ("7 ranks: weights", False)
    assert "use at most 6 ranks" in row.detail


def test_ranks_that_fail_or_hang_are_ended(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match="rank 1 of 2: ValueError: no more"):
        run_ranks(2, rank_work.fail_on_the_last_rank, timeout_s=TIMEOUT_S)
    with pytest.raises(RanksFailedError, match="2 ranks were not ready in 3 s"):
        run_ranks(2, rank_work.hang, str(tmp_path), timeout_s=3)
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_experts_of_a_real_model_over_ranks_say_what_the_dense_one_says(smollm2_path: Path, tmp_path: Path) -> None:
    """Whatever the routers choose, on whichever rank the expert is."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    prompt = tokenizer("The capital of France is")["input_ids"]
    dense = rank_work.decode_greedily(load_model(smollm2_path, device="cpu"), prompt, 8)
    sparse = upcycle(smollm2_path, tmp_path / "moe", num_experts=4)
    ranks = run_ranks(2, rank_work.load_and_decode_with_whole_experts, str(sparse), prompt, 8, timeout_s=TIMEOUT_S)
    assert ranks == [dense] * 2
