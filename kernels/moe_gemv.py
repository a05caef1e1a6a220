"""The experts of few tokens as matrix-vector products, which read the chosen experts' weights at full bandwidth.

    gated_gemv:  h[pair] = activation(gate[e] @ x[token]) * (up[e] @ x[token])
    down_gemv:   out[token] = sum over its choices c, in their order, of weights[c] * (down[e_c] @ h[pair c])

Nothing is sorted: a program takes a few output rows of one pair (gated_gemv) or of all choices of one token (down_gemv).
Programs of the same rows are neighbours, so an expert that two tokens share comes from memory once and then from L2. Sums are
float32; gate, up, h and out are rounded to the dtype of x once. A negative expert id contributes nothing; its row of h stays
unset.

Both take the experts chosen by route_tokens, or the router's logits, from which every program chooses for itself by the rules
of moe_routing.py. That costs each one a fraction of a microsecond, and saves a launch and its wait.

T tokens, C choices a token, P = T * C pairs, pair = token * C + choice, E experts, H hidden, F intermediate, U = 2 F (gate in
the first half).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, load_settled, wait_for_previous
from .gated_activation import activate
from .moe_routing import ChosenExperts, RouterLogits, expert_of, largest_keys, routing_keys, routing_weights


@dataclass(frozen=True, kw_only=True)
class GemvConfig:
    """`block_n` outputs a program, `block_k` inputs a step."""

    block_n: int
    block_k: int
    num_warps: int


@triton.jit
def _load_logits(logits_row, num_experts, COPIES: tl.constexpr, BLOCK_E: tl.constexpr):
    """COPIES equal rows [COPIES, BLOCK_E]: one a warp, which then reduces it without the others; -inf beyond the experts."""
    expert = tl.arange(0, BLOCK_E)[None, :] + tl.zeros([COPIES, 1], tl.int32)
    return expert, load_settled(logits_row + expert, expert < num_experts, -float("inf"))


@triton.jit
def _nth_expert(logits_row, num_experts, nth, COPIES: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert of choice `nth`, from 0."""
    expert, logits = _load_logits(logits_row, num_experts, COPIES, BLOCK_E)
    keys = routing_keys(logits, expert, num_experts)
    least = tl.min(keys, axis=1)
    best = tl.max(keys, axis=1)
    for _ in range(nth):
        best = tl.max(tl.where(keys < best[:, None], keys, least[:, None]), axis=1)
    return expert_of(tl.max(best, axis=0))


@triton.jit
def _all_choices(
    logits_row,
    num_experts,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """(weights, experts) [BLOCK_C], -1 beyond TOP_K."""
    expert, logits = _load_logits(logits_row, num_experts, COPIES, BLOCK_E)
    chosen = largest_keys(routing_keys(logits, expert, num_experts), TOP_K, BLOCK_C)
    weights = routing_weights(chosen, logits, TOP_K, RENORMALIZE, BLOCK_C)
    experts = tl.where(tl.arange(0, BLOCK_C)[None, :] < TOP_K, expert_of(chosen), -1)
    return tl.max(weights, axis=0), tl.max(experts, axis=0)


@triton.jit
def _gated_gemv_kernel(
    x,
    weight,
    experts,
    logits,
    h,
    num_outputs,
    num_experts,
    stride_x,
    stride_we,
    stride_wn,
    stride_logits,
    up_offset,
    NUM_CHOICES: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    COPIES: tl.constexpr,
):
    """`experts`, or None and `logits`. Waits before it lets the next start, which down_gemv relies on."""
    wait_for_previous(EARLY_START)
    let_next_start(EARLY_START)
    pair = tl.program_id(0)
    token = (pair // NUM_CHOICES).to(tl.int64)
    if experts is None:
        expert = _nth_expert(logits + token * stride_logits, num_experts, pair % NUM_CHOICES, COPIES, BLOCK_E)
    else:
        expert = tl.load(experts + pair)
        if expert < 0:
            return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_outputs = (n < num_outputs)[:, None]
    x_row = x + token * stride_x
    gate_N = weight + expert.to(tl.int64) * stride_we + n.to(tl.int64) * stride_wn
    gate_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.static_range(0, NUM_INPUTS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_block = in_outputs if NUM_INPUTS % BLOCK_K == 0 else in_outputs & (k < NUM_INPUTS)[None, :]
        gate = tl.load(gate_N[:, None] + k[None, :], in_block, other=0.0, eviction_policy="evict_first")
        up = tl.load(gate_N[:, None] + up_offset + k[None, :], in_block, other=0.0, eviction_policy="evict_first")
        x_K = tl.load(x_row + k, k < NUM_INPUTS, other=0.0).to(tl.float32)
        gate_NK += gate.to(tl.float32) * x_K[None, :]
        up_NK += up.to(tl.float32) * x_K[None, :]
    dtype = h.dtype.element_ty
    gate_sum_N = tl.sum(gate_NK, axis=1).to(dtype).to(tl.float32)
    up_sum_N = tl.sum(up_NK, axis=1).to(dtype).to(tl.float32)
    h_N = h + pair.to(tl.int64) * num_outputs + n
    tl.store(h_N, activate(gate_sum_N, up_sum_N, ACTIVATION).to(dtype), n < num_outputs)


@triton.jit
def _down_gemv_kernel(
    h,
    weight,
    scales,
    experts,
    logits,
    out,
    num_outputs,
    num_experts,
    stride_we,
    stride_wn,
    stride_logits,
    NUM_CHOICES: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    AFTER_GATE_UP: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    COPIES: tl.constexpr,
):
    """`scales` and `experts`, or None and `logits`.

    A tile spans all choices: their experts are one load, and no choice's weights wait for another's expert. AFTER_GATE_UP: all
    weights are on their way to registers while the gate-up kernel ends; h alone waits for it (dependent_launch.py says why).
    """
    let_next_start(EARLY_START)
    if not AFTER_GATE_UP:
        wait_for_previous(EARLY_START)
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    pair_C = token * NUM_CHOICES + c
    if experts is None:
        logits_row = logits + token.to(tl.int64) * stride_logits
        scale_C, expert_C = _all_choices(logits_row, num_experts, NUM_CHOICES, RENORMALIZE, COPIES, BLOCK_C, BLOCK_E)
    else:
        expert_C = load_settled(experts + pair_C, c < NUM_CHOICES, -1)
        scale_C = load_settled(scales + pair_C, c < NUM_CHOICES, 0.0)
    here_C = expert_C >= 0
    weight_CN = weight + (expert_C.to(tl.int64) * stride_we)[:, None] + (n.to(tl.int64) * stride_wn)[None, :]
    here_CN1 = (here_C[:, None] & (n < num_outputs)[None, :])[:, :, None]
    tiles = ()
    for start in tl.static_range(0, NUM_INPUTS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_tile = here_CN1 if NUM_INPUTS % BLOCK_K == 0 else here_CN1 & (k < NUM_INPUTS)[None, None, :]
        tile = tl.load(weight_CN[:, :, None] + k[None, None, :], in_tile, other=0.0, eviction_policy="evict_first")
        tiles += (tile,)  # type: ignore[assignment]
    if AFTER_GATE_UP:
        wait_for_previous(EARLY_START)
    sum_CNK = tl.zeros([BLOCK_C, BLOCK_N, BLOCK_K], tl.float32)
    for step in tl.static_range((NUM_INPUTS + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        h_CK = h + (pair_C * NUM_INPUTS)[:, None] + k[None, :]
        h_CK = tl.load(h_CK, here_C[:, None] & (k < NUM_INPUTS)[None, :], other=0.0)
        sum_CNK += tiles[step].to(tl.float32) * (h_CK.to(tl.float32) * scale_C[:, None])[:, None, :]
    out_N = out + token.to(tl.int64) * num_outputs + n
    tl.store(out_N, tl.sum(tl.sum(sum_CNK, axis=2), axis=0).to(out.dtype.element_ty), n < num_outputs)


def gated_gemv(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    routing: ChosenExperts | RouterLogits,
    activation: str,
    *,
    config: GemvConfig,
) -> torch.Tensor:
    """h [P, F] of x's dtype."""
    num_outputs = gate_up_weight_EUH.shape[1] // 2
    h_PF = x_TH.new_empty(x_TH.shape[0] * routing.num_choices, num_outputs)
    experts, logits, stride_logits = _routing_arguments(routing)
    _gated_gemv_kernel[(h_PF.shape[0], triton.cdiv(num_outputs, config.block_n))](
        x_TH,
        gate_up_weight_EUH,
        experts,
        logits,
        h_PF,
        num_outputs,
        gate_up_weight_EUH.shape[0],
        x_TH.stride(0),
        gate_up_weight_EUH.stride(0),
        gate_up_weight_EUH.stride(1),
        stride_logits,
        num_outputs * gate_up_weight_EUH.stride(1),
        NUM_INPUTS=x_TH.shape[1],
        ACTIVATION=activation,
        **_options(routing, config, gate_up_weight_EUH),
    )
    return h_PF


def down_gemv(
    h_PF: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    routing: ChosenExperts | RouterLogits,
    *,
    config: GemvConfig,
    after_gate_up: bool,
) -> torch.Tensor:
    """out [T, H] of h's dtype. `after_gate_up`: see run_down."""
    num_outputs = down_weight_EHF.shape[1]
    out_TH = h_PF.new_empty(h_PF.shape[0] // routing.num_choices, num_outputs)
    experts, logits, stride_logits = _routing_arguments(routing)
    _down_gemv_kernel[(out_TH.shape[0], triton.cdiv(num_outputs, config.block_n))](
        h_PF,
        down_weight_EHF,
        routing.weights_TC if isinstance(routing, ChosenExperts) else None,
        experts,
        logits,
        out_TH,
        num_outputs,
        down_weight_EHF.shape[0],
        down_weight_EHF.stride(0),
        down_weight_EHF.stride(1),
        stride_logits,
        NUM_INPUTS=h_PF.shape[1],
        RENORMALIZE=isinstance(routing, RouterLogits) and routing.renormalize,
        AFTER_GATE_UP=after_gate_up,
        BLOCK_C=triton.next_power_of_2(routing.num_choices),
        **_options(routing, config, down_weight_EHF),
    )
    return out_TH


def _routing_arguments(routing: ChosenExperts | RouterLogits) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """(experts, logits, stride of logits)."""
    if isinstance(routing, ChosenExperts):
        return routing.experts_TC, None, 0
    return None, routing.logits_TE, routing.logits_TE.stride(0)


def _options(routing: ChosenExperts | RouterLogits, config: GemvConfig, weight: torch.Tensor) -> dict[str, Any]:
    """What both launches share."""
    return {
        "NUM_CHOICES": routing.num_choices,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_E": triton.next_power_of_2(weight.shape[0]),
        "COPIES": config.num_warps,
        "num_warps": config.num_warps,
        **launch_options(weight.device),
    }
