"""DeepSeek-V2 and V3: latent attention, experts in groups chosen by softmax (V2) or corrected sigmoid scores (V3, R1)."""

from __future__ import annotations

from dataclasses import replace

from ...kernels.expert_scoring import ExpertScoring
from ..config_reader import ConfigReader
from ..family_spec import Field, LatentSpec
from . import glm4_moe, llama


def softmax_scoring(reader: ConfigReader) -> ExpertScoring:
    """`topk_method` says whether groups of experts are chosen first, by their best."""
    scale = float(reader.get("routed_scaling_factor", 1.0))
    groups = reader.get("n_group"), reader.get("topk_group")
    method = reader.get("topk_method", "greedy")
    if method == "greedy":
        return ExpertScoring(function="softmax", scale=scale)
    if method != "group_limited_greedy" or None in groups:
        raise reader.error(f"topk_method {method!r} with n_group, topk_group {groups} is not supported")
    return ExpertScoring(function="softmax", num_groups=groups[0], num_chosen_groups=groups[1], scale=scale)


V2 = replace(
    llama.SPEC,
    model_type="deepseek_v2",
    latent=LatentSpec(interleaved=True),
    moe=replace(glm4_moe.MOE, renormalize=False, scoring=softmax_scoring, correction=None),
)

V3 = replace(
    V2,
    model_type="deepseek_v3",
    mlp_bias=False,
    latent=LatentSpec(interleaved=Field("rope_interleave")),
    extra_layers=Field("num_mtp_layers"),
    moe=glm4_moe.MOE,
)
