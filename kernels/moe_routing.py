"""Chooses each token's experts and their weights.

    probabilities = softmax(logits) over all experts, float32
    experts       = those of the top_k largest logits, largest first; of equals the lowest expert id
    weights       = their probabilities; with renormalize divided by their sum

T tokens, E experts, C = top_k choices. Sources: Jiang et al. 2024, "Mixtral of Experts" (renormalised); Qwen3-MoE (its
norm_topk_prob decides).
"""

import torch
import triton
import triton.language as tl

from .cpu import ops as cpu_ops
from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import choose_backend

# Largest |weight - reference|: (relative, absolute). The logits' dtype does not matter: all arithmetic is float32.
TOLERANCE = (1e-5, 1e-6)


def route_tokens(logits_TE: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TC float32, experts_TC int32). ValueError where top_k is not in 1..E or logits are not [T, E]."""
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"route_tokens: logits {tuple(logits_TE.shape)} {logits_TE.dtype} must be float [tokens, experts]")
    if logits_TE.stride(1) != 1:
        raise ValueError("route_tokens: the last dimension of logits must be contiguous")
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"route_tokens: top_k {top_k} must be between 1 and the {logits_TE.shape[1]} experts")
    backend = choose_backend("route_tokens", logits_TE)
    if backend == "cpp":
        return cpu_ops.route_tokens(logits_TE, top_k, renormalize=renormalize)
    if backend == "triton":
        return _route_tokens_triton(logits_TE, top_k, renormalize=renormalize)
    return route_tokens_ref(logits_TE, top_k, renormalize=renormalize)


def route_tokens_ref(logits_TE: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    experts_TC = logits_TE.float().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TC = logits_TE.float().softmax(-1).gather(1, experts_TC)
    if renormalize:
        weights_TC = weights_TC / weights_TC.sum(-1, keepdim=True)
    return weights_TC, experts_TC.to(torch.int32)


@triton.jit
def _route_tokens_kernel(
    logits,
    weights,
    experts,
    num_experts,
    stride_logits,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program a token: takes the largest logit left TOP_K times."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    inside = expert < num_experts
    left = tl.load(logits + token * stride_logits + expert, inside, other=-float("inf")).to(tl.float32)
    largest = tl.max(left, axis=0)
    total = tl.sum(tl.exp(left - largest), axis=0)
    free = inside
    choice = tl.arange(0, BLOCK_C)
    chosen_experts = tl.zeros([BLOCK_C], tl.int32)
    chosen_weights = tl.zeros([BLOCK_C], tl.float32)
    for c in tl.static_range(TOP_K):
        best = tl.max(tl.where(free, left, -float("inf")), axis=0)
        best_expert = tl.min(tl.where(free & (left == best), expert, num_experts - 1), axis=0)
        free = free & (expert != best_expert)
        chosen_experts = tl.where(choice == c, best_expert, chosen_experts)
        chosen_weights = tl.where(choice == c, tl.exp(best - largest) / total, chosen_weights)
    if RENORMALIZE:
        chosen_weights = chosen_weights / tl.sum(chosen_weights, axis=0)
    tl.store(weights + token * TOP_K + choice, chosen_weights, choice < TOP_K)
    tl.store(experts + token * TOP_K + choice, chosen_experts, choice < TOP_K)


def _route_tokens_triton(logits_TE: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits_TE.shape
    weights_TC = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    experts_TC = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    if num_tokens > 0:
        _route_tokens_kernel[(num_tokens,)](
            logits_TE,
            weights_TC,
            experts_TC,
            num_experts,
            logits_TE.stride(0),
            TOP_K=top_k,
            RENORMALIZE=renormalize,
            BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_C=triton.next_power_of_2(top_k),
            num_warps=1,
            **launch_options(logits_TE.device),
        )
    return weights_TC, experts_TC
