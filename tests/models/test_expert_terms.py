"""Sparse layers leave the terms of their experts to the next norm, which gives what it gives where each layer sums its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import interpreter_patches
import pytest
import torch
from pilotfish.kernels.expert_terms import sum_terms, sum_terms_and_norm
from pilotfish.kernels.moe_mlp import moe_mlp
from pilotfish.models.build import load_model
from pilotfish.models.paged_sequences import PagedSequences
from transformers import PreTrainedModel

interpreter_patches.install()

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
ON_GPU = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 32, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("architecture", "config", "num_joined"),
    [("Qwen3MoeForCausalLM", {}, 3), ("Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": 64}, 0)],
    ids=["Qwen3Moe", "Qwen2Moe"],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_next_norm_sums(
    device: str,
    architecture: str,
    config: dict[str, int],
    num_joined: int,
    tmp_path: Path,
    save_checkpoint: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two layers, some of whose rows are wanted and then all, so that the last norm sums too; on the CPU in the interpreter."""
    interpreter_patches.need_kernels_for(device)
    if device == "cpu":
        for op in ("moe_mlp", "rms_norm"):
            monkeypatch.setattr(f"pilotfish.kernels.{op}.choose_backend", lambda *_: "triton")
    joined = []

    def counted(*args):
        joined.append(args)
        return sum_terms_and_norm(*args)

    monkeypatch.setattr("pilotfish.models.parallel.sum_terms_and_norm", counted)
    sizes = SIZES | config | (ON_GPU if device == "cuda" else {})
    save_checkpoint(tmp_path, architecture, **sizes)
    model = load_model(tmp_path, device=device)
    batch = PagedSequences(model, num_sequences=2, max_len=16)._batch({0: [3, 1, 4, 1], 1: [5]})
    rows = torch.tensor([3, 4], device=device)

    @torch.inference_mode()
    def run() -> list[torch.Tensor]:
        return [model(replace(batch, logits_rows_R=wanted)) for wanted in (rows, None)]

    some, every = run()
    assert torch.equal(some, every[rows])
    assert len(joined) == num_joined
    summed = lambda *args, **biases: sum_terms(moe_mlp(*args, **biases))  # noqa: E731
    monkeypatch.setattr("pilotfish.models.layers.expert_weights.moe_mlp", summed)
    assert all(torch.equal(hidden, expected) for hidden, expected in zip((some, every), run(), strict=True))
    assert len(joined) == num_joined
