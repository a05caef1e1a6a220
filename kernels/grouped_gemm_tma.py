"""The second grouped GEMM of grouped_gemm.py for tall tiles, whose operands come through tensor memory access (TMA).

The copy engine computes addresses and fills shared memory, which leaves registers and issue slots to the tensor cores. Programs
go through a list of tiles (grouped_tiles.py); of a persistent kernel there are as many as fit the GPU at once, and the loads of
the next tile are under way while one ends. The first GEMM has no such twin: it gathers rows of x, which the copy engine of
compute capability 9.0 cannot, and with the copy engine for the weights alone it was slower on an H200, at 8192 tokens.

P pairs, E experts, F intermediate, K inputs and N outputs of a GEMM.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .grouped_tiles import GroupedConfig, list_tiles, max_tiles

SHARED_BYTES_OF_TWO = 113 * 1024  # of a program that shares its multiprocessor with another


def fits_tma(x: torch.Tensor, weight_ENK: torch.Tensor) -> bool:
    """Whether TMA can read these: 16-bit numbers, one dtype, a weight without gaps, rows of multiples of 16 bytes."""
    is_aligned = weight_ENK.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0 and weight_ENK.shape[2] % 8 == 0
    return x.dtype == weight_ENK.dtype and x.element_size() == 2 and weight_ENK.is_contiguous() and is_aligned


@triton.jit
def _weighted_tma_kernel(
    h_desc,
    weight_desc,
    scales,
    y,
    pairs,
    tiles,
    num_inputs,
    num_outputs,
    max_num_tiles,
    num_blocks,
    bias,
    HAS_BIAS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Each program takes the tiles program, program + programs, ... h_desc: of [P, K] in sorted order; weight_desc: [E N, K].

    Rows beyond a tile's end and columns beyond N read others' values, which are not stored.
    """
    wait_for_previous(EARLY_START)
    let_next_start(EARLY_START)
    for item in tl.range(tl.program_id(0), tl.load(tiles) * num_blocks, tl.num_programs(0), flatten=PERSISTENT):
        tile = tiles + 1 + item // num_blocks
        first_n = (item % num_blocks) * BLOCK_N
        expert, first, end = tl.load(tile), tl.load(tile + max_num_tiles), tl.load(tile + 2 * max_num_tiles)
        sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, num_inputs, BLOCK_K):
            inputs = h_desc.load([first, start])
            weights = weight_desc.load([expert * num_outputs + first_n, start])
            sum_MN = tl.dot(inputs, weights.T, sum_MN)
        m = first + tl.arange(0, BLOCK_M)
        n = first_n + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            bias_N = tl.load(bias + expert.to(tl.int64) * num_outputs + n, n < num_outputs, other=0.0)
            sum_MN += bias_N.to(tl.float32)[None, :]
        pair = tl.load(pairs + m, m < end, other=0)
        y_tile = (sum_MN * tl.load(scales + pair, m < end, other=0.0)[:, None]).to(y.dtype.element_ty)
        y_MN = y + (pair.to(tl.int64) * num_outputs)[:, None] + n[None, :]
        tl.store(y_MN, y_tile, (m < end)[:, None] & (n < num_outputs)[None, :])


def weighted_tma_gemm(
    h_PF: torch.Tensor,
    weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    y_PH: torch.Tensor,
    pairs_P: torch.Tensor,
    expert_starts: torch.Tensor,
    *,
    config: GroupedConfig,
    bias_EH: torch.Tensor | None = None,
) -> None:
    """Fills y from h in sorted order."""
    num_experts, num_outputs, num_inputs = weight_EHF.shape
    num_pairs = h_PF.shape[0]
    num_blocks = triton.cdiv(num_outputs, config.block_n)
    most = max_tiles(num_pairs, num_experts, config.block_m)
    weight = weight_EHF.view(num_experts * num_outputs, num_inputs)
    _weighted_tma_kernel[(_num_programs(most * num_blocks, config, h_PF.device),)](
        TensorDescriptor.from_tensor(h_PF, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        weights_TC,
        y_PH,
        pairs_P,
        list_tiles(expert_starts, num_pairs, num_experts, config.block_m),
        num_inputs,
        num_outputs,
        most,
        num_blocks,
        bias_EH,
        HAS_BIAS=bias_EH is not None,
        PERSISTENT=config.persistent,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(h_PF.device),
    )


def _num_programs(num_items: int, config: GroupedConfig, device: torch.device) -> int:
    """One an item; of persistent ones as many as run at a time: two a multiprocessor where they are small."""
    if not config.persistent:
        return num_items
    shared_bytes = (config.block_m + config.block_n) * config.block_k * 2 * config.num_stages
    is_small = config.num_warps <= 4 and shared_bytes <= SHARED_BYTES_OF_TWO
    return min(num_items, _num_multiprocessors(device) * (2 if is_small else 1))


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3  # the interpreter's
