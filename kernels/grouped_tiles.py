"""How the pairs of experts are cut into tiles, one expert's pairs a tile: for the grouped GEMMs.

P pairs sorted by expert (moe_sort.py), E experts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, load_settled, wait_for_previous


@dataclass(frozen=True, kw_only=True)
class GroupedConfig:
    """How a grouped GEMM is cut into programs.

    Attributes:
        block_m: pairs a tile.
        block_n: outputs a program; a gated GEMM computes both the gate and the up of each.
        block_k: inputs a step.
        tma: of the second GEMM: weights and rows of h come through tensor memory access. Rows that are not sorted and tensors
            that it cannot read (fits_tma) are served with the same tiles without it.
        persistent: with tma: a program goes through many tiles, and loads the next one's while it ends this one.
        prefetch_lines: of 128 bytes of each weight row, a power of two or 0: what the first programs ask for before they wait,
            without tma.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    persistent: bool = False
    prefetch_lines: int = 0


@triton.jit
def find_tile(expert_starts, tile, num_experts, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first, end): tile number `tile` is BLOCK_M pairs from `first`, those before `end`. Expert E or more: no tile."""
    ids = tl.arange(0, BLOCK_E)
    starts = load_settled(expert_starts + ids, ids < num_experts, 0)
    ends = load_settled(expert_starts + 1 + ids, ids < num_experts, 0)
    num_tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    tiles_to_here = tl.cumsum(num_tiles, axis=0)
    expert = tl.sum((tiles_to_here <= tile).to(tl.int32), axis=0)
    first = starts + (tile - (tiles_to_here - num_tiles)) * BLOCK_M
    return expert, tl.sum(tl.where(ids == expert, first, 0), axis=0), tl.sum(tl.where(ids == expert, ends, 0), axis=0)


@triton.jit
def _list_tiles_kernel(
    expert_starts, tiles, num_experts, EARLY_START: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """One program a tile that there may be."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    tile, num_programs = tl.program_id(0), tl.num_programs(0)
    expert, first, end = find_tile(expert_starts, tile, num_experts, BLOCK_M, BLOCK_E)
    is_tile = expert < num_experts
    tl.store(tiles + 1 + tile, expert, is_tile)
    tl.store(tiles + 1 + num_programs + tile, first, is_tile)
    tl.store(tiles + 1 + 2 * num_programs + tile, end, is_tile)
    if tile == 0:
        ids = tl.arange(0, BLOCK_E)
        starts = tl.load(expert_starts + ids, ids < num_experts, other=0)
        ends = tl.load(expert_starts + 1 + ids, ids < num_experts, other=0)
        tl.store(tiles, tl.sum((ends - starts + BLOCK_M - 1) // BLOCK_M, axis=0))


def list_tiles(expert_starts: torch.Tensor, num_pairs: int, num_experts: int, block_m: int) -> torch.Tensor:
    """int32 [1 + 3 * max_tiles]: the number of tiles, then the experts, the first pairs and the ends of find_tile for each."""
    most = max_tiles(num_pairs, num_experts, block_m)
    tiles = torch.empty(1 + 3 * most, dtype=torch.int32, device=expert_starts.device)
    _list_tiles_kernel[(most,)](
        expert_starts,
        tiles,
        num_experts,
        BLOCK_M=block_m,
        BLOCK_E=triton.next_power_of_2(num_experts),
        num_warps=1,
        **launch_options(expert_starts.device),
    )
    return tiles


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """The most tiles that so many pairs can make: every expert's last one may be partly empty."""
    return (num_pairs + min(num_experts, num_pairs) * (block_m - 1)) // block_m
