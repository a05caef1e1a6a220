"""Qwen2-MoE and Qwen1.5-MoE: Qwen2 with experts, and beside them one that every token goes through, behind a gate."""

from __future__ import annotations

from dataclasses import replace

from ..family_spec import Field, MoeSpec, SharedExpertsSpec
from . import qwen2, qwen3_moe

SPEC = replace(
    qwen2.SPEC,
    model_type="qwen2_moe",
    qkv_bias=Field("qkv_bias"),
    moe=MoeSpec(
        num_experts=Field("num_experts"),
        intermediate_size=Field("moe_intermediate_size"),
        renormalize=Field("norm_topk_prob"),
        layers=qwen3_moe.sparse_layers,
        layouts=(qwen3_moe.PER_EXPERT, qwen3_moe.FUSED),
        shared=SharedExpertsSpec(
            intermediate_size=lambda reader: reader.size("shared_expert_intermediate_size"),
            name="mlp.shared_expert",
            gate="mlp.shared_expert_gate",
        ),
    ),
)
