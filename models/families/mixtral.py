"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from ..family_spec import Field, MoeSpec
from ..layers.expert_weights import ExpertNames
from . import llama, qwen3_moe

PER_EXPERT = ExpertNames(
    router="block_sparse_moe.gate",
    gate="block_sparse_moe.experts.{expert}.w1.weight",
    up="block_sparse_moe.experts.{expert}.w3.weight",
    down="block_sparse_moe.experts.{expert}.w2.weight",
)

SPEC = replace(
    llama.MISTRAL,
    model_type="mixtral",
    moe=MoeSpec(
        num_experts=Field("num_local_experts"),
        intermediate_size=Field("intermediate_size"),
        renormalize=True,
        layouts=(PER_EXPERT, qwen3_moe.FUSED),
    ),
)
