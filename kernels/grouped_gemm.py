"""Grouped GEMMs of experts over pairs sorted by expert (moe_sort.py), on tensor cores.

    gated_grouped_gemm:     h[pair] = activation(x[token] @ gate[e].T) * (x[token] @ up[e].T)
    weighted_grouped_gemm:  y[pair] = weights[pair] * (h[pair] @ down[e].T)

e is the expert of the pair. Sums are float32; gate, up and each result are rounded to the dtype of x once. Rows of pairs
that belong to no expert stay unset. A program takes a block of one expert's outputs and every num_slices-th tile of its pairs,
so the grid follows from shapes alone: nothing is read on the host, and an expert with no pairs costs an empty program.

T tokens, C choices a token, P = T * C pairs, E experts, H hidden, F intermediate, U = 2 F (gate in the first half), K inputs
and N outputs of a GEMM.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .gated_activation import activate


@dataclass(frozen=True, kw_only=True)
class GroupedConfig:
    """How a grouped GEMM is cut into programs.

    Attributes:
        block_m: pairs a tile.
        block_n: outputs a program; a gated GEMM computes both the gate and the up of each.
        block_k: inputs a step.
        num_slices: programs that share the tiles of one expert and block of outputs.
    """

    block_m: int
    block_n: int
    block_k: int
    num_slices: int
    num_warps: int
    num_stages: int


@triton.jit
def _grouped_gemm_kernel(
    x,
    weight,
    scales,
    y,
    pairs,
    expert_starts,
    num_inputs,
    num_outputs,
    stride_x,
    stride_we,
    stride_wn,
    up_offset,
    PAIRS_PER_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gated where ACTIVATION is named: the weight holds num_outputs gate rows, then as many up rows. Else scaled by pair."""
    expert = tl.program_id(2)
    first, end = tl.load(expert_starts + expert), tl.load(expert_starts + expert + 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight_N = weight + expert.to(tl.int64) * stride_we + n.to(tl.int64) * stride_wn
    weight_KN = weight_N[None, :] + k[:, None]
    in_outputs = (n < num_outputs)[None, :]
    for tile_start in range(first + tl.program_id(1) * BLOCK_M, end, tl.num_programs(1) * BLOCK_M):
        m = tile_start + tl.arange(0, BLOCK_M)
        in_expert = (m < end)[:, None]
        pair = tl.load(pairs + m, m < end, other=0)
        x_MK = x + ((pair // PAIRS_PER_ROW).to(tl.int64) * stride_x)[:, None] + k[None, :]
        sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, num_inputs, BLOCK_K):
            if EVEN_K:
                inputs = tl.load(x_MK + start, in_expert, other=0.0)
                in_block = in_outputs
            else:
                inputs = tl.load(x_MK + start, in_expert & (start + k < num_inputs)[None, :], other=0.0)
                in_block = in_outputs & (start + k < num_inputs)[:, None]
            outputs = tl.load(weight_KN + start, in_block, other=0.0).to(inputs.dtype)
            sum_MN = tl.dot(inputs, outputs, sum_MN, input_precision="ieee")
            if ACTIVATION is not None:
                outputs = tl.load(weight_KN + up_offset + start, in_block, other=0.0).to(inputs.dtype)
                up_MN = tl.dot(inputs, outputs, up_MN, input_precision="ieee")
        if ACTIVATION is not None:
            dtype = y.dtype.element_ty
            sum_MN = activate(sum_MN.to(dtype).to(tl.float32), up_MN.to(dtype).to(tl.float32), ACTIVATION)
        else:
            sum_MN *= tl.load(scales + pair, m < end, other=0.0)[:, None]
        y_MN = y + (pair.to(tl.int64) * num_outputs)[:, None] + n[None, :]
        tl.store(y_MN, sum_MN.to(y.dtype.element_ty), in_expert & in_outputs)


def gated_grouped_gemm(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    pairs_P: torch.Tensor,
    expert_starts: torch.Tensor,
    activation: str,
    *,
    config: GroupedConfig,
) -> torch.Tensor:
    """h [P, F] of x's dtype, in the order of pairs (not sorted)."""
    h_PF = x_TH.new_empty(pairs_P.shape[0], gate_up_weight_EUH.shape[1] // 2)
    _launch(x_TH, gate_up_weight_EUH, None, h_PF, pairs_P, expert_starts, activation=activation, config=config)
    return h_PF


def weighted_grouped_gemm(
    h_PF: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    pairs_P: torch.Tensor,
    expert_starts: torch.Tensor,
    *,
    config: GroupedConfig,
) -> torch.Tensor:
    """y [P, H] of h's dtype, in the order of pairs."""
    y_PH = h_PF.new_empty(h_PF.shape[0], down_weight_EHF.shape[1])
    _launch(h_PF, down_weight_EHF, weights_TC, y_PH, pairs_P, expert_starts, activation=None, config=config)
    return y_PH


def _launch(
    x_RK: torch.Tensor,
    weight_ENK: torch.Tensor,
    scales: torch.Tensor | None,
    y_PN: torch.Tensor,
    pairs_P: torch.Tensor,
    expert_starts: torch.Tensor,
    *,
    activation: str | None,
    config: GroupedConfig,
) -> None:
    num_experts, _, num_inputs = weight_ENK.shape
    grid = (triton.cdiv(y_PN.shape[1], config.block_n), config.num_slices, num_experts)
    _grouped_gemm_kernel[grid](
        x_RK,
        weight_ENK,
        scales,
        y_PN,
        pairs_P,
        expert_starts,
        num_inputs,
        y_PN.shape[1],
        x_RK.stride(0),
        weight_ENK.stride(0),
        weight_ENK.stride(1),
        y_PN.shape[1] * weight_ENK.stride(1),
        PAIRS_PER_ROW=y_PN.shape[0] // x_RK.shape[0],
        ACTIVATION=activation,
        EVEN_K=num_inputs % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
