"""Behind the last attention a step computes only the tokens whose logits are wanted, and they are what they are among all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pilotfish.models.build import load_model
from pilotfish.models.paged_sequences import PagedSequences
from transformers import PreTrainedModel

LATENT = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(
    ("architecture", "config"),
    [("Qwen3ForCausalLM", {}), ("Qwen3MoeForCausalLM", {}), ("DeepseekV3ForCausalLM", LATENT)],
    ids=["dense", "sparse", "latent"],
)
def test_wanted_rows_are_those_of_all(
    architecture: str,
    config: dict[str, int],
    num_layers: int,
    tmp_path: Path,
    save_checkpoint: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_checkpoint(tmp_path, architecture, num_hidden_layers=num_layers, **config)
    model = load_model(tmp_path, device="cpu")
    last, numbers = model.decoder_layers[-1], []

    def feed_forward(x, residual, whole=last.feed_forward):
        numbers.append(len(residual))
        return whole(x, residual)

    monkeypatch.setattr(last, "feed_forward", feed_forward)
    batch = PagedSequences(model, num_sequences=3, max_len=32)._batch({0: [3, 1, 4, 1, 5], 1: [9], 2: [2, 6, 5]})
    with torch.inference_mode():
        every = model(replace(batch, logits_rows_R=None))
        for wanted in ([4, 5, 8], [8], [], list(range(9))):
            rows = torch.tensor(wanted, dtype=torch.int64)
            assert torch.equal(model(replace(batch, logits_rows_R=rows)), every[rows])
            assert numbers.pop() == len(wanted)
    assert numbers == [9]
