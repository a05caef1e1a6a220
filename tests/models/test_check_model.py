"""The proof of a checkpoint passes on good ones, sharded or not, and fails on each thing that can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pilotfish.models import check
from pilotfish.models.build import load_model
from pilotfish.models.check import check_model, choose_prompts, compare, run_reference
from pilotfish.models.checkpoint import INDEX_FILE, SINGLE_FILE
from transformers import PreTrainedModel

SaveCheckpoint = Callable[..., PreTrainedModel]
CLAIMS = ["weights", "prefill logits", "decode logits", "greedy tokens", "chunked prefill"]


def test_sharded_checkpoint_is_proved(tmp_path: Path, save_checkpoint: SaveCheckpoint) -> None:
    save_checkpoint(tmp_path, "Qwen3MoeForCausalLM", dtype=torch.bfloat16, save={"max_shard_size": "60KB"})
    assert (tmp_path / INDEX_FILE).exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    rows = check_model(tmp_path)
    assert [row.name for row in rows] == CLAIMS
    assert all(row.ok for row in rows), rows


def test_truncated_checkpoint_is_reported(llama: Path) -> None:
    content = (llama / SINGLE_FILE).read_bytes()
    (llama / SINGLE_FILE).write_bytes(content[:-1])
    (row,) = check_model(llama)
    assert (row.name, row.ok) == ("weights", False)
    assert "truncated" in row.detail


def test_checkpoint_that_transformers_cannot_load_is_reported(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = check.load_model

    def load_then_break(path: Path, **options: object) -> object:
        model = real(path, **options)
        (path / "config.json").write_text(json.dumps({"model_type": "unknown"}))
        return model

    monkeypatch.setattr(check, "load_model", load_then_break)
    rows = check_model(llama)
    assert [(row.name, row.ok) for row in rows] == [("weights", True), ("reference", False)]


def test_a_slightly_wrong_model_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = check.load_model

    def load_wrong(path: Path, **options: object) -> object:
        model = real(path, **options)
        model.layers[1].mlp.down_proj.weight[3] *= 1.01
        return model

    monkeypatch.setattr(check, "load_model", load_wrong)
    assert {row.name: row.ok for row in check_model(llama)} == dict.fromkeys(CLAIMS, False) | {
        "weights": True,
        "greedy tokens": True,
    }


def test_every_parameter_matters(tmp_path: Path, save_checkpoint: SaveCheckpoint) -> None:
    """Change one parameter by 3 %, or make one element no number: the proof fails each time."""
    untouched = save_checkpoint(tmp_path, "Qwen3MoeForCausalLM", attention_bias=True, mlp_only_layers=[1])
    model = load_model(tmp_path, device="cpu")
    reference = run_reference(untouched, choose_prompts(model, seed=0)[2])
    assert all(row.ok for row in compare(model, [reference]))
    parameters = dict(model.named_parameters())
    kinds = {name.split(".", 2)[-1]: name for name in parameters}  # one layer's of each kind
    assert len(kinds) > 12
    for name in kinds.values():
        original = parameters[name].clone()
        parameters[name].mul_(1.03)
        rows = {row.name: row.ok for row in compare(model, [reference])}
        assert not rows["prefill logits"], name
        assert not rows["decode logits"], name
        assert not rows["chunked prefill"], name
        parameters[name].copy_(original)
    parameters["embedding.weight"][reference.prompt[0]] = float("nan")
    assert not any(row.ok for row in compare(model, [reference]))


def test_wrong_tokens_are_named(llama: Path, save_checkpoint: SaveCheckpoint) -> None:
    model = load_model(llama, device="cpu")
    model.embedding.head_weight.neg_()
    untouched = save_checkpoint(llama, "LlamaForCausalLM")
    rows = compare(model, [run_reference(untouched, [1, 2, 3])])
    assert [row.ok for row in rows] == [False] * 4
    assert rows[2].detail.startswith("prompt 0 (3 tokens), step 0: ")


def test_prompts_are_longer_than_the_window_and_fit_the_model(tmp_path: Path, save_checkpoint: SaveCheckpoint) -> None:
    save_checkpoint(tmp_path, "MistralForCausalLM", sliding_window=60)
    model = load_model(tmp_path, device="cpu")
    assert [len(prompt) for prompt in choose_prompts(model, seed=0)] == [1, 5, 17, 40, 69]
    save_checkpoint(tmp_path, "MistralForCausalLM", sliding_window=60, max_position_embeddings=48)
    assert [len(prompt) for prompt in choose_prompts(load_model(tmp_path, device="cpu"), seed=0)] == [1, 5, 17, 32, 32]
