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
from .dispatch import choose_backend, kernel_mode

# Largest |weight - reference|: (relative, absolute). The logits' dtype does not matter: all arithmetic is float32.
TOLERANCE = (1e-5, 1e-6)
MAX_EXPERTS = 0x2000  # of a routing key


def route_tokens(logits_TE: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TC float32, experts_TC int32). ValueError where top_k is not in 1..E or logits are not [T, E]."""
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"route_tokens: logits {tuple(logits_TE.shape)} {logits_TE.dtype} must be float [tokens, experts]")
    if logits_TE.stride(1) != 1:
        raise ValueError("route_tokens: the last dimension of logits must be contiguous")
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"route_tokens: top_k {top_k} must be between 1 and the {logits_TE.shape[1]} experts")
    if logits_TE.shape[1] > MAX_EXPERTS:
        raise ValueError(f"route_tokens: {logits_TE.shape[1]} experts are more than the {MAX_EXPERTS} that a key can name")
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
def _keys_of(logits, expert, num_experts):
    """Integers whose order is that in which experts are chosen: of larger logits, of equals of the lower id. Unique.

    `logits` of any shape and float dtype, `expert` their ids in a shape that fits; ids from num_experts on get the lowest key.
    int32 for logits of 16 bits, which leave 13 bits of float32 for the id; int64 for others.
    """
    wide = logits.to(tl.float32)
    bits = tl.where(wide == 0.0, 0.0, wide).to(tl.int32, bitcast=True)  # -0 equals 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if logits.dtype == tl.float32:
        key = tl.where(expert < num_experts, (order.to(tl.int64) << 32) | (0x1FFF - expert), -0x8000000000000000)
    else:
        key = tl.where(expert < num_experts, (order & -0x2000) | (0x1FFF - expert), -0x80000000)
    return key


@triton.jit
def _logits_of(keys):
    """float32, exactly the logits that went into the keys, but for the sign of zero."""
    if keys.dtype == tl.int64:
        order = (keys >> 32).to(tl.int32)
        bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    else:
        bits = (keys ^ ((keys >> 31) & 0x7FFFFFFF)) & -0x2000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _route_tokens_kernel(
    logits,
    weights,
    experts,
    num_tokens,
    num_experts,
    stride_logits,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program BLOCK_T tokens: takes the largest key left TOP_K times."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)[None, :]
    logits_TE = logits + token.to(tl.int64)[:, None] * stride_logits + expert
    logits_TE = tl.load(logits_TE, (token < num_tokens)[:, None] & (expert < num_experts), other=-float("inf"))
    keys_TE = _keys_of(logits_TE, expert, num_experts)
    least_T = tl.min(keys_TE, axis=1)
    choice = tl.arange(0, BLOCK_C)[None, :]
    chosen_TC = tl.broadcast_to(least_T[:, None], [BLOCK_T, BLOCK_C])
    for c in tl.static_range(TOP_K):
        best_T = tl.max(keys_TE, axis=1)
        keys_TE = tl.where(keys_TE == best_T[:, None], least_T[:, None], keys_TE)
        chosen_TC = tl.where(choice == c, best_T[:, None], chosen_TC)
    chosen_logits_TC = tl.where(choice < TOP_K, _logits_of(chosen_TC), -float("inf"))
    largest_T1 = tl.max(chosen_logits_TC, axis=1)[:, None]
    weights_TC = tl.exp(chosen_logits_TC - largest_T1)
    # The sum over all experts cancels when the chosen ones' weights are divided by theirs.
    total_T = tl.sum(weights_TC, axis=1) if RENORMALIZE else tl.sum(tl.exp(logits_TE.to(tl.float32) - largest_T1), axis=1)
    pair = token.to(tl.int64)[:, None] * TOP_K + choice
    inside = (token < num_tokens)[:, None] & (choice < TOP_K)
    tl.store(weights + pair, weights_TC / total_T[:, None], inside)
    tl.store(experts + pair, 0x1FFF - (chosen_TC & 0x1FFF).to(tl.int32), inside)


def _route_tokens_triton(logits_TE: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits_TE.shape
    weights_TC = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    experts_TC = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    if num_tokens > 0:
        block_t = 1 if num_tokens <= 256 or kernel_mode() == "invariant" else 4  # one warp a token
        _route_tokens_kernel[(triton.cdiv(num_tokens, block_t),)](
            logits_TE,
            weights_TC,
            experts_TC,
            num_tokens,
            num_experts,
            logits_TE.stride(0),
            TOP_K=top_k,
            RENORMALIZE=renormalize,
            BLOCK_T=block_t,
            BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_C=triton.next_power_of_2(top_k),
            num_warps=block_t,
            **launch_options(logits_TE.device),
        )
    return weights_TC, experts_TC
