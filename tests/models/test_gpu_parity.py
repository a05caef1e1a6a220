"""Families on a GPU: float32 equals transformers, bfloat16 is as close to float32 as transformers' own bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotfish.models.build import load_model
from pilotfish.models.check import check_model, choose_prompts, run_reference
from pilotfish.models.paged_sequences import PagedSequences
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = pytest.mark.gpu
# Head sizes below 16 and odd widths are not what the GPU kernels are for.
SIZES = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 32, "vocab_size": 512}
LATENT = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
SaveCheckpoint = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("MistralForCausalLM", {"sliding_window": 11}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}),
        ("MixtralForCausalLM", {}),
        ("Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": 64}),
        ("Glm4MoeForCausalLM", {"n_group": 4, "topk_group": 2, "use_qk_norm": True}),
        ("DeepseekV2ForCausalLM", LATENT | {"q_lora_rank": None}),
        ("DeepseekV3ForCausalLM", LATENT | {"num_attention_heads": 32, "num_key_value_heads": 32}),
        ("GptOssForCausalLM", {}),
    ],
)
def test_float32_equals_transformers(
    architecture: str, config: dict[str, Any], tmp_path: Path, save_checkpoint: SaveCheckpoint
) -> None:
    save_checkpoint(tmp_path, architecture, **(SIZES | config))
    rows = check_model(tmp_path, device="cuda")
    assert all(row.ok for row in rows), rows


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_bfloat16_is_as_exact_as_transformers(architecture: str, tmp_path: Path, save_checkpoint: SaveCheckpoint) -> None:
    exact = save_checkpoint(tmp_path, architecture, dtype=torch.bfloat16, **SIZES)
    model = load_model(tmp_path, device="cuda")
    assert {parameter.dtype for parameter in model.parameters()} == {model.dtype} == {torch.bfloat16}
    references = [run_reference(exact, prompt) for prompt in choose_prompts(model, seed=0)]
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).to("cuda")
    paged = PagedSequences(model, num_sequences=len(references), max_len=256)
    tokens = [reference.prompt + reference.tokens for reference in references]
    got = paged.extend(dict(enumerate(tokens)))
    with torch.inference_mode():
        theirs = [rounded(torch.tensor([row], device="cuda")).logits[0].float().cpu() for row in tokens]

    def spread(logits: list[torch.Tensor]) -> float:
        """Root mean square of the difference from float32."""
        return torch.cat([x - r.logits_PV for x, r in zip(logits, references, strict=True)]).square().mean().sqrt().item()

    assert spread([got[i] for i in range(len(tokens))]) < 1.2 * spread(theirs)
