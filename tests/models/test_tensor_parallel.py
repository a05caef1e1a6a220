"""Tensor parallelism over real processes, joined by gloo: tiny models of every layer kind, and a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_work
from pilotfish.common.errors import ModelNotFound
from pilotfish.models.build import load_model
from pilotfish.models.check import check_model, choose_prompts, run_reference, save_references
from pilotfish.models.local_ranks import RanksFailedError, run_ranks
from pilotfish.models.store import resolve
from transformers import AutoTokenizer, PreTrainedModel

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
    made = []
    for architecture, config in MODELS:
        path = tmp_path_factory.mktemp(architecture)
        untouched = save_checkpoint(path, architecture, **config)
        prompts = choose_prompts(load_model(path, device="cpu"), seed=0)
        save_references([run_reference(untouched, prompt) for prompt in prompts], path / "references.pt")
        made.append((str(path), str(path / "references.pt")))
    return made


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tiny_models_equal_transformers_on_every_rank(size: int, checkpoints: list[tuple[str, str]]) -> None:
    for models in run_ranks(size, rank_work.compare_all, checkpoints, timeout_s=TIMEOUT_S):
        for (architecture, _), rows in zip(MODELS, models, strict=True):
            assert len(rows) == 5
            assert all(ok for _, ok, _ in rows), (architecture, rows)


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    try:
        return resolve(MODEL, allow_download=False).path
    except ModelNotFound:
        pytest.skip(f"{MODEL} is not set up: run `pilotfish pull {MODEL}`")


@pytest.mark.parametrize("size", [2, 3])
def test_smollm2_says_the_same_over_ranks(size: int, smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    question = "What is the capital of France? Explain gravity in one sentence."
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    alone = rank_work.decode_greedily(load_model(smollm2_path, device="cpu"), prompt, 9)
    assert tokenizer.decode(alone).startswith("The capital of France is Paris.<|im_end|>")
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
