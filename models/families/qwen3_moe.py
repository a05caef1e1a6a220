"""Qwen3-MoE: Qwen3 with experts in most layers and one window for all."""

from __future__ import annotations

from dataclasses import replace

from ..config_reader import ConfigReader
from ..family_spec import Field, MoeSpec, same_window
from ..layers.expert_weights import ExpertNames
from . import qwen3

ROUTER = "mlp.gate"
PER_EXPERT = ExpertNames(
    router=ROUTER,
    gate="mlp.experts.{expert}.gate_proj.weight",
    up="mlp.experts.{expert}.up_proj.weight",
    down="mlp.experts.{expert}.down_proj.weight",
)
FUSED = ExpertNames(router=ROUTER, gate="mlp.experts.gate_up_proj", up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj")


def sparse_layers(reader: ConfigReader, num_layers: int) -> frozenset[int]:
    """Every decoder_sparse_step-th layer, but for mlp_only_layers."""
    step, dense = reader.size("decoder_sparse_step"), reader.get("mlp_only_layers", ())
    return frozenset(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense)


SPEC = replace(
    qwen3.SPEC,
    model_type="qwen3_moe",
    windows=same_window,
    moe=MoeSpec(
        num_experts=Field("num_experts"),
        intermediate_size=Field("moe_intermediate_size"),
        renormalize=Field("norm_topk_prob"),
        layers=sparse_layers,
        layouts=(PER_EXPERT, FUSED),
    ),
)
