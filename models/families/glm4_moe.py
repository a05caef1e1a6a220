"""GLM-4.5 and 4.6 (GLM-4-MoE): Llama with head norms in some, a partial rotary embedding, and experts chosen by sigmoid."""

from __future__ import annotations

from dataclasses import replace

from ...kernels.expert_scoring import ExpertScoring
from ..config_reader import ConfigReader
from ..family_spec import Field, MoeSpec, SharedExpertsSpec
from . import llama, qwen3_moe


def sparse_layers(reader: ConfigReader, num_layers: int) -> frozenset[int]:
    """All but the first_k_dense_replace first ones."""
    return frozenset(range(reader.get("first_k_dense_replace", 0), num_layers))


def sigmoid_scoring(reader: ConfigReader) -> ExpertScoring:
    """Groups of experts are ranked by their two best."""
    num_groups = reader.size("n_group", 1)
    return ExpertScoring(
        function="sigmoid",
        num_groups=num_groups,
        num_chosen_groups=reader.size("topk_group", num_groups),
        group_top=2,
        scale=float(reader.get("routed_scaling_factor", 1.0)),
    )


MOE = MoeSpec(
    num_experts=Field("n_routed_experts"),
    intermediate_size=Field("moe_intermediate_size"),
    renormalize=Field("norm_topk_prob"),
    layers=sparse_layers,
    layouts=(qwen3_moe.PER_EXPERT, qwen3_moe.FUSED),
    scoring=sigmoid_scoring,
    correction="mlp.gate.e_score_correction_bias",
    shared=SharedExpertsSpec(
        intermediate_size=lambda reader: reader.size("moe_intermediate_size") * reader.size("n_shared_experts"),
        name="mlp.shared_experts",
    ),
)

SPEC = replace(
    llama.SPEC,
    model_type="glm4_moe",
    output_bias=False,
    mlp_bias=False,
    qk_norm=Field("use_qk_norm"),
    partial_rotary=True,
    extra_layers=Field("num_mtp_layers"),
    moe=MOE,
)
