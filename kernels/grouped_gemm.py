"""Grouped GEMM over tokens sorted by expert: y[pair] = x[row of pair] @ weight[expert of pair].T, float32 accumulation.

A pair is one choice of one token: pair = token * C + choice. `sort_by_expert` puts the pairs in the order of their experts
(stable, so that runs repeat bit by bit); a tile of BLOCK_M pairs then reads the weights of one expert. Everything stays on
the device: the number of tiles is bounded, not known, and those beyond the last leave at once.

T tokens, C choices, E experts, K input and N output features.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """Pairs sorted by expert. Pairs whose expert id is negative come first and belong to no tile."""

    pairs: torch.Tensor  # [T * C] int32, pairs in the order of their experts
    expert_starts: torch.Tensor  # [E + 1] int32, where each expert's pairs start in `pairs`; the last is their end
    tile_starts: torch.Tensor  # [E + 1] int32, the first tile of each expert; the last is the number of tiles
    block_m: int  # pairs a tile
    max_tiles: int  # bound on the number of tiles


def sort_by_expert(experts_TC: torch.Tensor, num_experts: int) -> ExpertOrder:
    """The order of the pairs of `experts_TC`, with tiles as tall as an expert's average share asks for."""
    num_pairs = experts_TC.numel()
    block_m = min(max(triton.next_power_of_2(triton.cdiv(num_pairs, num_experts)), 16), 128)
    sorted_ids, pairs = experts_TC.flatten().sort(stable=True)
    boundaries = torch.arange(num_experts + 1, dtype=sorted_ids.dtype, device=sorted_ids.device)
    expert_starts = torch.searchsorted(sorted_ids, boundaries, out_int32=True)
    tile_starts = torch.zeros_like(expert_starts)
    torch.cumsum((expert_starts.diff() + block_m - 1) // block_m, dim=0, out=tile_starts[1:])
    return ExpertOrder(
        pairs=pairs.to(torch.int32),
        expert_starts=expert_starts,
        tile_starts=tile_starts,
        block_m=block_m,
        max_tiles=num_pairs // block_m + min(num_experts, num_pairs),
    )


@triton.jit
def _grouped_gemm_kernel(
    x,
    weight,
    y,
    pairs,
    expert_starts,
    tile_starts,
    num_experts,
    num_inputs,
    num_outputs,
    stride_x,
    stride_we,
    stride_wn,
    CHOICES_PER_ROW: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a tile of pairs of one expert and a block of outputs."""
    tile = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    starts = tl.load(tile_starts + e, e <= num_experts, other=0x7FFFFFFF)
    # Of experts that start at one tile only the last has pairs.
    expert = tl.sum((starts <= tile).to(tl.int32), axis=0) - 1
    if expert >= num_experts:
        return
    m = tl.load(expert_starts + expert) + (tile - tl.load(tile_starts + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_expert = m < tl.load(expert_starts + expert + 1)
    pair = tl.load(pairs + m, in_expert, other=0)
    source, target = m, m
    if CHOICES_PER_ROW > 0:
        source = pair // CHOICES_PER_ROW
    if SCATTER:
        target = pair

    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_M = x + source.to(tl.int64) * stride_x
    weight_N = weight + expert.to(tl.int64) * stride_we + n.to(tl.int64) * stride_wn
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        inside = start + k < num_inputs
        x_MK = tl.load(x_M[:, None] + (start + k)[None, :], in_expert[:, None] & inside[None, :], other=0.0)
        weight_KN = tl.load(weight_N[None, :] + (start + k)[:, None], (n < num_outputs)[None, :] & inside[:, None], other=0.0)
        sum_MN += tl.dot(x_MK, weight_KN.to(x_MK.dtype), input_precision="ieee")
    tl.store(
        y + (target.to(tl.int64) * num_outputs)[:, None] + n[None, :],
        sum_MN.to(y.dtype.element_ty),
        in_expert[:, None] & (n < num_outputs)[None, :],
    )


def grouped_gemm(
    x_RK: torch.Tensor,
    weight_ENK: torch.Tensor,
    y_PN: torch.Tensor,
    order: ExpertOrder,
    *,
    choices_per_row: int | None,
    scatter: bool,
) -> None:
    """Writes y, contiguous, of one row a pair; rows of pairs whose expert id is negative stay unset.

    With `choices_per_row` a pair reads row pair // choices_per_row of x, without it x is sorted by expert already.
    `scatter` writes y in the order of pairs, else it stays sorted by expert.
    """
    num_experts, num_outputs, num_inputs = weight_ENK.shape
    wide = x_RK.element_size() > 2
    block_n, block_k = (64, 32) if wide else (128, 64)
    _grouped_gemm_kernel[(order.max_tiles, triton.cdiv(num_outputs, block_n))](
        x_RK,
        weight_ENK,
        y_PN,
        order.pairs,
        order.expert_starts,
        order.tile_starts,
        num_experts,
        num_inputs,
        num_outputs,
        x_RK.stride(0),
        weight_ENK.stride(0),
        weight_ENK.stride(1),
        CHOICES_PER_ROW=choices_per_row or 0,
        SCATTER=scatter,
        BLOCK_E=triton.next_power_of_2(num_experts + 1),
        BLOCK_M=order.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if order.block_m >= 64 else 4,
    )
