"""Tiny random checkpoints of every family, saved as transformers saves them: no part of a model may be left out unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

# Sizes that fit every family; 6 heads and 3 kv heads also divide over 3 ranks.
TINY = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
TINY_MOE = {"num_experts_per_tok": 2, "num_experts": 5, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "routed_scaling_factor": 1.5}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
}
# What a family has besides, or calls by another name.
SIZES = {
    "DeepseekV2ForCausalLM": ROUTED | LATENT,
    "DeepseekV3ForCausalLM": ROUTED | LATENT | {"n_group": 4, "topk_group": 2},
    "Glm4MoeForCausalLM": ROUTED,
    "GptOssForCausalLM": {"num_experts_per_tok": 2, "num_local_experts": 5, "sliding_window": 11},
    "MixtralForCausalLM": {"num_experts_per_tok": 2, "num_local_experts": 5},
    "Qwen2MoeForCausalLM": TINY_MOE | {"shared_expert_intermediate_size": 36},
    "Qwen3MoeForCausalLM": TINY_MOE,
}


def save_checkpoint(
    path: Path, architecture: str, *, dtype: torch.dtype = torch.float32, save: dict[str, Any] | None = None, **config: Any
) -> transformers.PreTrainedModel:
    """Writes a checkpoint as transformers does, and returns the same model in float32."""
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**(TINY | SIZES.get(architecture, {}) | config)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("sinks"):
                parameter.copy_(2 * noise)
            elif parameter.dim() == 1 or name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.to(dtype).save_pretrained(path, **(save or {}))
    if dtype != torch.float32:
        # Not model.float(): the rotary buffers went to the lower precision too.
        model = model_class.from_pretrained(path, dtype=torch.float32)
    return model.eval()
