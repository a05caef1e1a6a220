"""gpt-oss with weights in 16 or 32 bits: sinks in every head, windows in every second layer, experts with biases."""

from __future__ import annotations

from dataclasses import replace

from ...kernels.clamped_gate import ClampedGate
from ..config_reader import ConfigReader
from ..family_spec import Field, MoeSpec, window_by_layer_type
from ..layers.expert_weights import ExpertNames
from . import llama

_GATE_UP = "mlp.experts.gate_up_proj"


def clamped_gate(reader: ConfigReader) -> ClampedGate:
    return ClampedGate(alpha=float(reader.get("swiglu_alpha", 1.702)), limit=float(reader.get("swiglu_limit", 7.0)))


SPEC = replace(
    llama.SPEC,
    model_type="gpt_oss",
    mlp_bias=False,
    windows=window_by_layer_type,
    sinks=True,
    moe=MoeSpec(
        num_experts=Field("num_local_experts"),
        intermediate_size=Field("intermediate_size"),
        renormalize=True,  # softmax over the chosen ones
        layouts=(ExpertNames(router="mlp.router", gate=_GATE_UP, up=_GATE_UP, down="mlp.experts.down_proj", by_columns=True),),
        bias=True,
        clamped_gate=clamped_gate,
    ),
)
