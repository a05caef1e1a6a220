"""The experts of very few tokens as matrix-vector products, which read just the chosen experts' weights at full bandwidth.

    gated_gemv:  h[pair] = activation(gate[e] @ x[token]) * (up[e] @ x[token])
    down_gemv:   out[token] = sum over its choices c, in their order, of weights[c] * (down[e_c] @ h[pair c])

Each product may have a bias of the expert's. Nothing is sorted: a program takes a few output rows of one pair (gated_gemv) or
of all choices of one token (down_gemv), so an expert that two tokens share is read twice. Sums are float32; gate, up, h and out
are rounded to the dtype of x once. A negative expert id contributes nothing; its row of h stays unset.

T tokens, C choices a token, P = T * C pairs, pair = token * C + choice, E experts, H hidden, F intermediate, U = 2 F (gate in
the first half).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .gated_activation import Activation, activate, activation_constants


@dataclass(frozen=True, kw_only=True)
class GemvConfig:
    """`block_n` outputs a program, `block_k` inputs a step."""

    block_n: int
    block_k: int
    num_warps: int


@triton.jit
def _gated_gemv_kernel(
    x,
    weight,
    experts,
    h,
    num_outputs,
    stride_x,
    stride_we,
    stride_wn,
    up_offset,
    bias,
    NUM_CHOICES: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    pair = tl.program_id(1)
    expert = tl.load(experts + pair)
    if expert < 0:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_outputs = (n < num_outputs)[:, None]
    x_row = x + (pair // NUM_CHOICES).to(tl.int64) * stride_x
    gate_N = weight + expert.to(tl.int64) * stride_we + n.to(tl.int64) * stride_wn
    if HAS_BIAS:  # asked for before the products, which hide its way
        bias_N = bias + expert.to(tl.int64) * (2 * num_outputs) + n
        gate_bias_N = tl.load(bias_N, n < num_outputs, other=0.0)
        up_bias_N = tl.load(bias_N + num_outputs, n < num_outputs, other=0.0)
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
    gate_sum_N = tl.sum(gate_NK, axis=1)
    if HAS_BIAS:
        gate_sum_N += gate_bias_N.to(tl.float32)
    gate_sum_N = gate_sum_N.to(dtype).to(tl.float32)
    up_sum_N = tl.sum(up_NK, axis=1)
    if HAS_BIAS:
        up_sum_N += up_bias_N.to(tl.float32)
    up_sum_N = up_sum_N.to(dtype).to(tl.float32)
    h_N = h + pair.to(tl.int64) * num_outputs + n
    tl.store(h_N, activate(gate_sum_N, up_sum_N, ACTIVATION, ALPHA, LIMIT).to(dtype), n < num_outputs)


@triton.jit
def _down_gemv_kernel(
    h,
    weight,
    scales,
    experts,
    out,
    num_outputs,
    stride_we,
    stride_wn,
    bias,
    NUM_CHOICES: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile spans all choices: their experts are one load, and no choice's weights wait for another's expert."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    token = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    pair_C = token * NUM_CHOICES + c
    expert_C = tl.load(experts + pair_C, c < NUM_CHOICES, other=-1)
    scale_C = tl.load(scales + pair_C, c < NUM_CHOICES, other=0.0)
    here_C = expert_C >= 0
    weight_CN = weight + (expert_C.to(tl.int64) * stride_we)[:, None] + (n.to(tl.int64) * stride_wn)[None, :]
    here_CN = here_C[:, None] & (n < num_outputs)[None, :]
    if HAS_BIAS:
        bias_CN = tl.load(bias + (expert_C.to(tl.int64) * num_outputs)[:, None] + n[None, :], here_CN, other=0.0)
    sum_CNK = tl.zeros([BLOCK_C, BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.static_range(0, NUM_INPUTS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_inputs = k < NUM_INPUTS
        down = tl.load(
            weight_CN[:, :, None] + k[None, None, :],
            here_CN[:, :, None] & in_inputs[None, None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        h_CK = tl.load(h + (pair_C * NUM_INPUTS)[:, None] + k[None, :], here_C[:, None] & in_inputs[None, :], other=0.0)
        sum_CNK += down.to(tl.float32) * (h_CK.to(tl.float32) * scale_C[:, None])[:, None, :]
    sum_CN = tl.sum(sum_CNK, axis=2)
    if HAS_BIAS:
        sum_CN += bias_CN.to(tl.float32) * scale_C[:, None]
    out_N = out + token.to(tl.int64) * num_outputs + n
    tl.store(out_N, tl.sum(sum_CN, axis=0).to(out.dtype.element_ty), n < num_outputs)


def gated_gemv(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    experts_TC: torch.Tensor,
    activation: Activation,
    *,
    config: GemvConfig,
    bias_EU: torch.Tensor | None = None,
) -> torch.Tensor:
    """h [P, F] of x's dtype."""
    num_outputs = gate_up_weight_EUH.shape[1] // 2
    h_PF = x_TH.new_empty(experts_TC.numel(), num_outputs)
    _gated_gemv_kernel[(triton.cdiv(num_outputs, config.block_n), h_PF.shape[0])](
        x_TH,
        gate_up_weight_EUH,
        experts_TC,
        h_PF,
        num_outputs,
        x_TH.stride(0),
        gate_up_weight_EUH.stride(0),
        gate_up_weight_EUH.stride(1),
        num_outputs * gate_up_weight_EUH.stride(1),
        bias_EU,
        NUM_CHOICES=experts_TC.shape[1],
        NUM_INPUTS=x_TH.shape[1],
        HAS_BIAS=bias_EU is not None,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        **activation_constants(activation),
        **launch_options(x_TH.device),
    )
    return h_PF


def down_gemv(
    h_PF: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    *,
    config: GemvConfig,
    bias_EH: torch.Tensor | None = None,
) -> torch.Tensor:
    """out [T, H] of h's dtype."""
    (num_tokens, num_choices), num_outputs = experts_TC.shape, down_weight_EHF.shape[1]
    out_TH = h_PF.new_empty(num_tokens, num_outputs)
    _down_gemv_kernel[(triton.cdiv(num_outputs, config.block_n), num_tokens)](
        h_PF,
        down_weight_EHF,
        weights_TC,
        experts_TC,
        out_TH,
        num_outputs,
        down_weight_EHF.stride(0),
        down_weight_EHF.stride(1),
        bias_EH,
        NUM_CHOICES=num_choices,
        NUM_INPUTS=h_PF.shape[1],
        HAS_BIAS=bias_EH is not None,
        BLOCK_C=triton.next_power_of_2(num_choices),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        **launch_options(h_PF.device),
    )
    return out_TH
