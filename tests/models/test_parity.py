"""Every family against untouched transformers: prefill, decode and chunked prefill of mixed lengths over the paged cache.

An architecture without a row here fails the last test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotfish.models.build import load_model
from pilotfish.models.check import choose_prompts, compare, run_reference
from pilotfish.models.registry import ARCHITECTURES
from transformers import PreTrainedModel

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DEEPSEEK_YARN = YARN | {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.1}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
MANY_HEADS = {"hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": 32}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 11}
FUSED = {"save": {"save_original_format": False}}

ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("LlamaForCausalLM", "grouped heads", {}),
    ("LlamaForCausalLM", "one kv head, tied", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("LlamaForCausalLM", "as many kv heads, all biases", {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", "wide heads, gelu", {"head_dim": 32, "hidden_act": "gelu_pytorch_tanh"}),
    ("LlamaForCausalLM", "stored in bfloat16", {"dtype": torch.bfloat16}),
    ("LlamaForCausalLM", "stored in float16, tied", {"dtype": torch.float16, "tie_word_embeddings": True}),
    ("LlamaForCausalLM", "linear rope", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}),
    ("LlamaForCausalLM", "dynamic rope", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}),
    ("LlamaForCausalLM", "llama3 rope", {"rope_parameters": LLAMA3}),
    ("LlamaForCausalLM", "yarn rope", {"rope_parameters": YARN}),
    ("MistralForCausalLM", "sliding window", {"sliding_window": 11}),
    ("MistralForCausalLM", "no window", {"sliding_window": None}),
    ("Qwen2ForCausalLM", "biases, tied", {"tie_word_embeddings": True}),
    ("Qwen2ForCausalLM", "biases, stored in bfloat16", {"dtype": torch.bfloat16}),
    ("Qwen2ForCausalLM", "upper layers slide", SLIDING | {"max_window_layers": 1}),
    ("Qwen3ForCausalLM", "head norms", {}),
    (
        "Qwen3ForCausalLM",
        "biases, lower layer slides",
        SLIDING
        | {
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    ("Qwen3ForCausalLM", "bfloat16, yarn", {"dtype": torch.bfloat16, "rope_parameters": YARN}),
    ("Qwen3MoeForCausalLM", "all sparse, renormalized", {"norm_topk_prob": True}),
    ("Qwen3MoeForCausalLM", "every second layer, biases", {"decoder_sparse_step": 2, "attention_bias": True}),
    ("Qwen3MoeForCausalLM", "one dense layer, bfloat16", {"mlp_only_layers": [1], "dtype": torch.bfloat16}),
    ("Qwen3MoeForCausalLM", "sliding window, fused experts", SLIDING | FUSED),
    ("Qwen2MoeForCausalLM", "a gated shared expert", {}),
    ("Qwen2MoeForCausalLM", "renormalized, no biases, fused experts", {"norm_topk_prob": True, "qkv_bias": False} | FUSED),
    ("Qwen2MoeForCausalLM", "sliding window, one dense layer", SLIDING | {"mlp_only_layers": [1], "dtype": torch.bfloat16}),
    ("MixtralForCausalLM", "tensors for each expert", {}),
    ("MixtralForCausalLM", "sliding window, fused experts", {"sliding_window": 11} | FUSED),
    ("Glm4MoeForCausalLM", "half of a head turns", {}),
    (
        "Glm4MoeForCausalLM",
        "groups, head norms, biases",
        {"n_group": 4, "topk_group": 2, "use_qk_norm": True, "attention_bias": True, "norm_topk_prob": False},
    ),
    (
        "Glm4MoeForCausalLM",
        "all sparse, two shared experts, bfloat16, fused experts",
        {"first_k_dense_replace": 0, "n_shared_experts": 2, "dtype": torch.bfloat16} | FUSED,
    ),
    ("DeepseekV2ForCausalLM", "greedy, queries from a latent", {}),
    ("DeepseekV2ForCausalLM", "groups, yarn", GROUPED | {"rope_parameters": DEEPSEEK_YARN}),
    (
        "DeepseekV2ForCausalLM",
        "queries without a latent, biases",
        {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True},
    ),
    ("DeepseekV2ForCausalLM", "all sparse, bfloat16", {"first_k_dense_replace": 0, "dtype": torch.bfloat16}),
    ("DeepseekV3ForCausalLM", "groups", {}),
    (
        "DeepseekV3ForCausalLM",
        "yarn, biases, fused experts",
        {"rope_parameters": DEEPSEEK_YARN, "attention_bias": True} | FUSED,
    ),
    (
        "DeepseekV3ForCausalLM",
        "32 heads, halves, not renormalized",
        MANY_HEADS | {"rope_interleave": False, "norm_topk_prob": False},
    ),
    (
        "DeepseekV3ForCausalLM",
        "wide latent, no latent of queries",
        {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "q_lora_rank": None},
    ),
    ("GptOssForCausalLM", "sinks, windows, yarn", {}),
    ("GptOssForCausalLM", "often clamped, default rope", {"swiglu_limit": 0.5, "swiglu_alpha": 1.1, "rope_parameters": ROPE}),
    ("GptOssForCausalLM", "no biases of attention, bfloat16", {"attention_bias": False, "dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(
    ("architecture", "config"), [(row[0], row[2]) for row in ROWS], ids=[f"{row[0]}: {row[1]}" for row in ROWS]
)
def test_equals_transformers(
    architecture: str, config: dict[str, Any], tmp_path: Path, save_checkpoint: Callable[..., PreTrainedModel]
) -> None:
    untouched = save_checkpoint(tmp_path, architecture, **config)
    model = load_model(tmp_path, device="cpu")
    references = [run_reference(untouched, prompt) for prompt in choose_prompts(model, seed=0)]
    rows = compare(model, references)
    assert [row.name for row in rows] == ["prefill logits", "decode logits", "greedy tokens", "chunked prefill"]
    assert all(row.ok for row in rows), rows


def test_every_architecture_has_a_row() -> None:
    assert set(ARCHITECTURES) == {row[0] for row in ROWS}
