"""Chooses each token's experts by scores that are corrected, limited to groups of experts, and scaled.

    score   = softmax(logits) over all experts, or sigmoid(logits), float32
    rank    = score + correction
    groups  = the num_chosen_groups with the largest sum of their group_top largest ranks, of num_groups neighbours in id
    experts = those of the top_k largest ranks in these groups, largest first; of equals the lowest id, of groups too
    weights = their scores; with renormalize divided by their sum + 1e-20; times scale

T tokens, E experts, C = top_k choices, G groups of S = E / G experts. moe_routing.py has the plain softmax. Sources:
DeepSeek-AI 2024, "DeepSeek-V2" (groups) and "DeepSeek-V3" (sigmoid, correction); GLM-4.5.
"""

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import choose_backend
from .expert_scoring import ExpertScoring

# Largest |weight - reference|: (relative, absolute), of weights up to about 1.
TOLERANCE = (1e-5, 1e-6)


def choose_experts(
    logits_TE: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool,
    scoring: ExpertScoring,
    correction_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TC float32, experts_TC int32). The correction is float32.

    ValueError where logits are not [T, E], or so many cannot be chosen.
    """
    _check(logits_TE, top_k, scoring, correction_E)
    tensors = [logits_TE] if correction_E is None else [logits_TE, correction_E]
    run = _choose_experts_triton if choose_backend("choose_experts", *tensors) == "triton" else choose_experts_ref
    return run(logits_TE, top_k, renormalize=renormalize, scoring=scoring, correction_E=correction_E)


def choose_experts_ref(
    logits_TE: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool,
    scoring: ExpertScoring,
    correction_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide_TE = logits_TE.float()
    score_TE = wide_TE.softmax(-1) if scoring.function == "softmax" else wide_TE.sigmoid()
    rank_TE = score_TE if correction_E is None else score_TE + correction_E
    if scoring.num_chosen_groups < scoring.num_groups:
        rank_TGS = rank_TE.unflatten(1, (scoring.num_groups, -1))
        group_rank_TG = rank_TGS.topk(scoring.group_top, dim=-1).values.sum(-1)
        groups_TG = group_rank_TG.sort(dim=-1, descending=True, stable=True).indices[:, : scoring.num_chosen_groups]
        stays_TG = torch.zeros_like(group_rank_TG, dtype=torch.bool).scatter_(1, groups_TG, True)
        rank_TE = rank_TGS.masked_fill(~stays_TG.unsqueeze(-1), -float("inf")).flatten(1)
    experts_TC = rank_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TC = score_TE.gather(1, experts_TC)
    if renormalize:
        weights_TC = weights_TC / (weights_TC.sum(-1, keepdim=True) + 1e-20)
    return weights_TC * scoring.scale, experts_TC.to(torch.int32)


@triton.jit
def _group_stays(rank_GS, group_size, GROUP_TOP: tl.constexpr, NUM_CHOSEN: tl.constexpr, BLOCK_G: tl.constexpr):
    """int32 [BLOCK_G]: 1 for the groups whose experts may be chosen. Ranks are -inf where there is no expert."""
    group_G = tl.arange(0, BLOCK_G)
    member_1S = tl.arange(0, rank_GS.shape[1])[None, :]
    total_G = tl.zeros([BLOCK_G], tl.float32)
    for _ in tl.static_range(GROUP_TOP):
        best_G = tl.max(rank_GS, axis=1)
        total_G += best_G
        first_G = tl.min(tl.where(rank_GS == best_G[:, None], member_1S, group_size), axis=1)
        rank_GS = tl.where(member_1S == first_G[:, None], -float("inf"), rank_GS)
    stays_G = tl.zeros([BLOCK_G], tl.int32)
    for _ in tl.static_range(NUM_CHOSEN):
        best = tl.min(tl.where(total_G == tl.max(total_G, axis=0), group_G, BLOCK_G), axis=0)
        stays_G = tl.where(group_G == best, 1, stays_G)
        total_G = tl.where(group_G == best, -float("inf"), total_G)
    return stays_G


@triton.jit
def _choose_experts_kernel(
    logits,
    correction,
    weights,
    experts,
    num_experts,
    stride_logits,
    scale,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program a token: takes the largest rank left TOP_K times."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    token = tl.program_id(0).to(tl.int64)
    group_size = num_experts // NUM_GROUPS
    group_G1, member_1S = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_S)[None, :]
    inside_GS = (group_G1 < NUM_GROUPS) & (member_1S < group_size)
    expert_GS = tl.where(inside_GS, group_G1 * group_size + member_1S, num_experts)
    logit_GS = tl.load(logits + token * stride_logits + expert_GS, inside_GS, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        score_GS = tl.sigmoid(logit_GS)
    else:
        score_GS = tl.exp(logit_GS - tl.max(tl.max(logit_GS, axis=1), axis=0))
        score_GS = score_GS / tl.sum(tl.sum(score_GS, axis=1), axis=0)
    rank_GS = score_GS
    if HAS_CORRECTION:
        rank_GS += tl.load(correction + expert_GS, inside_GS, other=0.0)
    rank_GS = tl.where(inside_GS, rank_GS, -float("inf"))
    if NUM_CHOSEN < NUM_GROUPS:
        stays_G = _group_stays(rank_GS, group_size, GROUP_TOP, NUM_CHOSEN, BLOCK_G)
        rank_GS = tl.where(stays_G[:, None] > 0, rank_GS, -float("inf"))
    choice_C = tl.arange(0, BLOCK_C)
    chosen_C = tl.zeros([BLOCK_C], tl.int32)
    weight_C = tl.zeros([BLOCK_C], tl.float32)
    for c in tl.static_range(TOP_K):
        best = tl.max(tl.max(rank_GS, axis=1), axis=0)
        expert = tl.min(tl.min(tl.where(rank_GS == best, expert_GS, num_experts), axis=1), axis=0)
        score = tl.sum(tl.sum(tl.where(expert_GS == expert, score_GS, 0.0), axis=1), axis=0)
        rank_GS = tl.where(expert_GS == expert, -float("inf"), rank_GS)
        chosen_C = tl.where(choice_C == c, expert, chosen_C)
        weight_C = tl.where(choice_C == c, score, weight_C)
    if RENORMALIZE:
        weight_C = weight_C / (tl.sum(weight_C, axis=0) + 1e-20)
    tl.store(weights + token * TOP_K + choice_C, weight_C * scale, choice_C < TOP_K)
    tl.store(experts + token * TOP_K + choice_C, chosen_C, choice_C < TOP_K)


def _choose_experts_triton(
    logits_TE: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool,
    scoring: ExpertScoring,
    correction_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits_TE.shape
    weights_TC = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    experts_TC = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    if num_tokens > 0:
        _choose_experts_kernel[(num_tokens,)](
            logits_TE,
            correction_E,
            weights_TC,
            experts_TC,
            num_experts,
            logits_TE.stride(0),
            float(scoring.scale),
            TOP_K=top_k,
            SIGMOID=scoring.function == "sigmoid",
            HAS_CORRECTION=correction_E is not None,
            RENORMALIZE=renormalize,
            NUM_GROUPS=scoring.num_groups,
            NUM_CHOSEN=scoring.num_chosen_groups,
            GROUP_TOP=scoring.group_top,
            BLOCK_G=triton.next_power_of_2(scoring.num_groups),
            BLOCK_S=triton.next_power_of_2(num_experts // scoring.num_groups),
            BLOCK_C=triton.next_power_of_2(top_k),
            num_warps=1,
            **launch_options(logits_TE.device),
        )
    return weights_TC, experts_TC


def _check(logits_TE: torch.Tensor, top_k: int, scoring: ExpertScoring, correction_E: torch.Tensor | None) -> None:
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"choose_experts: logits {tuple(logits_TE.shape)} {logits_TE.dtype} must be float [tokens, experts]")
    if logits_TE.stride(1) != 1:
        raise ValueError("choose_experts: the last dimension of logits must be contiguous")
    problem = scoring.problem(logits_TE.shape[1], top_k)
    if problem is not None:
        raise ValueError(f"choose_experts: {problem}")
    if correction_E is None:
        return
    if correction_E.shape != logits_TE.shape[1:] or correction_E.dtype != torch.float32 or not correction_E.is_contiguous():
        raise ValueError(
            f"choose_experts: correction {tuple(correction_E.shape)} {correction_E.dtype} must be a float32 number an expert"
        )
