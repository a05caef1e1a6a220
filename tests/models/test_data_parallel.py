"""Data ranks with prompts of their own, two tensor ranks each: every one of them says what transformers says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_rank_work
import pytest
from pilotfish.common.errors import ConfigError, ModelLoadError
from pilotfish.models.build import check_ranks, load_model
from pilotfish.models.check import check_model, choose_prompts, run_reference, save_references
from rank_group_run import run_on_ranks
from transformers import PreTrainedModel

SaveCheckpoint = Callable[..., PreTrainedModel]
# Latent attention, groups and shared experts; a shared expert behind a gate; a dense layer among sparse ones; biases and sinks.
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("DeepseekV3ForCausalLM", {}),
    ("Qwen2MoeForCausalLM", {}),
    ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 44, "mlp_only_layers": [1]}),
    ("GptOssForCausalLM", {}),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: SaveCheckpoint) -> list[tuple[str, list[str]]]:
    """Each model's directory, and for each data rank the file of what transformers answers."""
    made = []
    for name, config in MODELS:
        path = tmp_path_factory.mktemp(name)
        untouched = save_checkpoint(path, name, **config)
        model, files = load_model(path, device="cpu"), []
        for rank in range(2):
            files.append(str(path / f"references-{rank}.pt"))
            prompts = choose_prompts(model, seed=rank)  # of the same lengths
            save_references([run_reference(untouched, prompt) for prompt in prompts], Path(files[-1]))
        made.append((str(path), files))
    return made


@pytest.mark.parametrize(("most_gathered", "numbers"), [(16, (0, 1, 2, 3)), (512, (0, 3))])
def test_tiny_models_equal_transformers_on_every_rank(
    checkpoints: list[tuple[str, list[str]]], most_gathered: int, numbers: tuple[int, ...]
) -> None:
    """Through both dispatchers, and through the one for few tokens alone."""
    arguments = (2, data_rank_work.compare_on_data_ranks, [checkpoints[n] for n in numbers], most_gathered)
    for rank, models in enumerate(run_on_ranks(*arguments, device_type="cpu", data_size=2)):
        for number, rows in zip(numbers, models, strict=True):
            assert len(rows) == 5
            assert all(ok for _, ok, _ in rows), (rank, MODELS[number], rows)


def test_check_model_proves_data_ranks_too(checkpoints: list[tuple[str, list[str]]]) -> None:
    path, _ = checkpoints[-1]
    rows = check_model(path, data_parallel=2, expert_parallel=True)
    assert [row.name for row in rows[5:]] == [f"2 ranks: {row.name}" for row in rows[:5]]
    assert all(row.ok for row in rows), rows
    with pytest.raises(ConfigError, match="data_parallel needs expert_parallel"):
        check_model(path, data_parallel=2)


def test_what_data_ranks_cannot_share_is_said_before_anything_starts(
    checkpoints: list[tuple[str, list[str]]], llama: Path
) -> None:
    path, _ = checkpoints[1]  # 5 experts
    check_ranks(path, size=2, whole_experts=True, data_size=2)
    with pytest.raises(ModelLoadError, match="number of experts 5 cannot be split over 6 ranks: use at most 5"):
        check_ranks(path, size=2, whole_experts=True, data_size=3)
    with pytest.raises(ModelLoadError, match=r"no sparse layers.*num_replicas"):
        check_ranks(llama, size=1, whole_experts=True, data_size=2)
