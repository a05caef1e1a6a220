"""The experts of very few tokens as matrix-vector products, which read just the chosen experts' weights at full bandwidth.

    gated_gemv:  h[pair] = activation(gate[e] @ x[token]) * (up[e] @ x[token])
    down_gemv:   out[token] = sum over its choices c, in their order, of weights[c] * (down[e_c] @ h[pair c])

Nothing is sorted: a program takes a few output rows of one pair (gated_gemv) or of all choices of one token (down_gemv), so an
expert that two tokens share is read twice. Sums are float32; gate, up, h and out are rounded to the dtype of x once. A negative
expert id contributes nothing; its row of h stays unset.

T tokens, C choices a token, P = T * C pairs, pair = token * C + choice, E experts, H hidden, F intermediate, U = 2 F (gate in
the first half).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .gated_activation import activate


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
    NUM_CHOICES: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pair = tl.program_id(1)
    expert = tl.load(experts + pair)
    if expert < 0:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_outputs = (n < num_outputs)[:, None]
    x_row = x + (pair // NUM_CHOICES).to(tl.int64) * stride_x
    gate_N = weight + expert.to(tl.int64) * stride_we + n.to(tl.int64) * stride_wn
    gate_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.static_range(0, NUM_INPUTS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if NUM_INPUTS % BLOCK_K == 0:
            x_K = tl.load(x_row + k).to(tl.float32)
            in_block = in_outputs
        else:
            x_K = tl.load(x_row + k, k < NUM_INPUTS, other=0.0).to(tl.float32)
            in_block = in_outputs & (k < NUM_INPUTS)[None, :]
        gate = tl.load(gate_N[:, None] + k[None, :], in_block, other=0.0, eviction_policy="evict_first")
        up = tl.load(gate_N[:, None] + up_offset + k[None, :], in_block, other=0.0, eviction_policy="evict_first")
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
    out,
    num_outputs,
    stride_we,
    stride_wn,
    NUM_CHOICES: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_outputs = (n < num_outputs)[:, None]
    weight_N = weight + n.to(tl.int64) * stride_wn
    sum_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for choice in tl.static_range(NUM_CHOICES):
        # Masks rather than branches: the loads of all choices are in flight together.
        pair = token * NUM_CHOICES + choice
        expert = tl.load(experts + pair)
        scale = tl.load(scales + pair)
        here = tl.broadcast_to(expert, [BLOCK_K]) >= 0
        for start in tl.static_range(0, NUM_INPUTS, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            in_inputs = here & (k < NUM_INPUTS)
            h_K = tl.load(h + pair * NUM_INPUTS + k, in_inputs, other=0.0).to(tl.float32) * scale
            weight_NK = weight_N[:, None] + expert.to(tl.int64) * stride_we + k[None, :]
            down = tl.load(weight_NK, in_outputs & in_inputs[None, :], other=0.0, eviction_policy="evict_first")
            sum_NK += down.to(tl.float32) * h_K[None, :]
    out_N = out + token.to(tl.int64) * num_outputs + n
    tl.store(out_N, tl.sum(sum_NK, axis=1).to(out.dtype.element_ty), n < num_outputs)


def gated_gemv(
    x_TH: torch.Tensor, gate_up_weight_EUH: torch.Tensor, experts_TC: torch.Tensor, activation: str, *, config: GemvConfig
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
        NUM_CHOICES=experts_TC.shape[1],
        NUM_INPUTS=x_TH.shape[1],
        ACTIVATION=activation,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )
    return h_PF


def down_gemv(
    h_PF: torch.Tensor, down_weight_EHF: torch.Tensor, weights_TC: torch.Tensor, experts_TC: torch.Tensor, *, config: GemvConfig
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
        NUM_CHOICES=num_choices,
        NUM_INPUTS=h_PF.shape[1],
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )
    return out_TH
