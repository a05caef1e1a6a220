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

from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .gated_activation import activate


@dataclass(frozen=True, kw_only=True)
class GroupedConfig:
    """How a grouped GEMM is cut into programs.

    Attributes:
        block_m: pairs a tile.
        block_n: outputs a program; a gated GEMM computes both the gate and the up of each.
        block_k: inputs a step.
        num_slices: programs that share the tiles of one expert and block of outputs.
        overlap_tiles: a program that has several tiles loads the next one's inputs while it ends this one.
    """

    block_m: int
    block_n: int
    block_k: int
    num_slices: int
    num_warps: int
    num_stages: int
    overlap_tiles: bool = False


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
    PAIRS_PER_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAP_TILES: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gated where ACTIVATION is named: the weight holds num_outputs gate rows, then as many up rows. Else scaled by pair.

    A gated tile's columns are gate, up, gate, up...: one product serves both, and each gate lies in one thread with its up.
    Rows and columns outside read others' values instead of a mask, and are not stored.
    """
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    expert = tl.program_id(2)
    first, end = tl.load(expert_starts + expert), tl.load(expert_starts + expert + 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    COLUMNS: tl.constexpr = BLOCK_N if ACTIVATION is None else 2 * BLOCK_N
    column = tl.arange(0, COLUMNS)
    if ACTIVATION is None:
        weight_row = tl.minimum(tl.program_id(0) * BLOCK_N + column, num_outputs - 1)
    else:
        weight_row = tl.minimum(tl.program_id(0) * BLOCK_N + column // 2, num_outputs - 1) + (column % 2) * num_outputs
    weight_N = weight + expert.to(tl.int64) * stride_we + weight_row.to(tl.int64) * stride_wn
    weight_KN = weight_N[None, :] + k[:, None]
    first_tile, stride_tile = first + tl.program_id(1) * BLOCK_M, tl.num_programs(1) * BLOCK_M
    for tile_start in tl.range(first_tile, end, stride_tile, flatten=OVERLAP_TILES):
        m = tile_start + tl.arange(0, BLOCK_M)
        pair = tl.load(pairs + m, m < end, other=0)
        x_MK = x + ((pair // PAIRS_PER_ROW).to(tl.int64) * stride_x)[:, None] + k[None, :]
        sum_MN = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
        for start in range(0, num_inputs, BLOCK_K):
            if EVEN_K:
                inputs = tl.load(x_MK + start)
                outputs = tl.load(weight_KN + start)
            else:
                inputs = tl.load(x_MK + start, (start + k < num_inputs)[None, :], other=0.0)
                outputs = tl.load(weight_KN + start, (start + k < num_inputs)[:, None], other=0.0)
            sum_MN = tl.dot(inputs, outputs.to(inputs.dtype), sum_MN, input_precision="ieee")
        dtype = y.dtype.element_ty
        if ACTIVATION is not None:
            gate_MN, up_MN = tl.split(sum_MN.to(dtype).reshape(BLOCK_M, BLOCK_N, 2))
            y_tile = activate(gate_MN.to(tl.float32), up_MN.to(tl.float32), ACTIVATION).to(dtype)
        else:
            y_tile = (sum_MN * tl.load(scales + pair, m < end, other=0.0)[:, None]).to(dtype)
        y_MN = y + (pair.to(tl.int64) * num_outputs)[:, None] + n[None, :]
        tl.store(y_MN, y_tile, (m < end)[:, None] & (n < num_outputs)[None, :])


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
        PAIRS_PER_ROW=y_PN.shape[0] // x_RK.shape[0],
        ACTIVATION=activation,
        EVEN_K=num_inputs % config.block_k == 0,
        OVERLAP_TILES=config.overlap_tiles,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x_RK.device),
    )
