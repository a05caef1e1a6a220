"""Launch parameters of the attention kernels: the one place to change after a measurement (benchmarks/gpu/bench_attention.py).

They follow from shapes alone, so that a captured CUDA graph serves any context lengths.
"""

from dataclasses import dataclass

import triton

KEY_TILE_BYTES = 16 * 1024  # a tile of keys: several fit in shared memory, for loads to run ahead of the arithmetic
NUM_MULTIPROCESSORS = 132  # of an H100 or H200
MAX_SPLITS = 128


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """num_splits: programs that share the keys of one row and kv head. block_j: keys a step."""

    num_splits: int
    block_j: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class FusedDecodeConfig:
    """num_splits: CTAs that share the keys of a row and kv head, 1, 2, 4 or 8. num_stages: tiles of 16 keys that a warp has."""

    num_splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """block_m: rows of a tile, a query and a head of its group each. block_j: keys a step, a power of two.

    products_overlap: see prefill_attention.py. max_registers: of a thread, None for as many as there are.
    """

    block_m: int
    block_j: int
    num_warps: int
    num_stages: int
    products_overlap: bool = True
    max_registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class SpecializedPrefillConfig:
    """keys: of a step, a multiple of 16."""

    keys: int
    num_stages: int


# Worth measuring: what shared memory holds beside the queries of three tiles, with the most keys a step to the fewest.
SPECIALIZED_PREFILL_CONFIGS = tuple(
    SpecializedPrefillConfig(keys=keys, num_stages=num_stages)
    for keys, num_stages in ((128, 2), (112, 2), (96, 2), (80, 3), (64, 4))
)


def padded_head_dim(head_dim: int) -> int:
    return max(triton.next_power_of_2(head_dim), 16)


def decode_config(
    *, num_rows: int, num_kv_heads: int, group: int, head_dim: int, element_bytes: int, max_keys: int
) -> DecodeConfig:
    """`max_keys` is what the widest row could hold: the width of the block table times the page length.

    Measured on an H200 with 768 keys a row. Few results are split until the GPU is full, the fewest with more threads for each,
    those from half a program a multiprocessor on in long steps, which keep more loads ahead, and without a split from one on.
    """
    row_bytes = padded_head_dim(head_dim) * element_bytes
    num_results = num_rows * num_kv_heads
    programs, block_j, num_warps, num_stages = 2 * NUM_MULTIPROCESSORS, _keys_a_step(row_bytes, element_bytes), 4, 3
    if element_bytes != 2 or row_bytes > 512:
        num_warps = 8 if group > 64 or row_bytes > 2048 else 4
        num_stages = _stages(row_bytes, element_bytes)
    elif num_results <= 16:
        num_warps, num_stages = 8, 4
    elif num_results <= NUM_MULTIPROCESSORS // 4:
        programs, num_stages = NUM_MULTIPROCESSORS, 5
    elif num_results <= NUM_MULTIPROCESSORS // 2:
        programs, block_j, num_stages = 4 * NUM_MULTIPROCESSORS, block_j // 2, 5
    elif num_results <= 2 * NUM_MULTIPROCESSORS:
        block_j, num_warps = 2 * block_j, 8
    return DecodeConfig(
        num_splits=max(min(programs // num_results, triton.cdiv(max_keys, block_j), MAX_SPLITS), 1),
        block_j=block_j,
        num_warps=8 if group > 64 else num_warps,
        num_stages=num_stages,
    )


def fused_decode_config(*, num_rows: int, num_kv_heads: int) -> FusedDecodeConfig:
    """Up to one CTA of many warps a multiprocessor, which all read from the start; of more rows, smaller ones that take turns.

    Clusters of four or eight fill half of the GPU at most: where multiprocessors of a cluster's neighbourhood are taken by a
    kernel that starts or ends beside this one, a cluster would wait for a second turn. Measured on an H200 with 640 to 8192
    keys a row (benchmarks/gpu/bench_fused_decode.py), for many rows between products of cuBLAS, as in a step.
    """
    num_results = num_rows * num_kv_heads
    if num_results > 3 * NUM_MULTIPROCESSORS:
        return FusedDecodeConfig(num_splits=1, num_warps=2, num_stages=3)
    if num_results > NUM_MULTIPROCESSORS:
        return FusedDecodeConfig(num_splits=1, num_warps=4, num_stages=3)
    num_splits = 2 if 2 * num_results <= NUM_MULTIPROCESSORS else 1
    while num_splits < 8 and 4 * num_splits * num_results <= NUM_MULTIPROCESSORS:
        num_splits *= 2
    return FusedDecodeConfig(num_splits=num_splits, num_warps=8, num_stages=2)


def prefill_config(*, group: int, head_dim: int, element_bytes: int) -> PrefillConfig:
    """As many rows as the accumulator, float32 [block_m, head_dim], leaves registers for; Hopper's tensor cores want 64.

    128 rows of a head_dim up to 128 fit in half of a multiprocessor's registers, and two programs share it. From 256 on, two
    products under way leave too few registers, and the compiler would make each of their instructions wait for the last.
    """
    width = padded_head_dim(head_dim)
    row_bytes = width * element_bytes
    rows = 16
    if element_bytes == 2:
        rows = 128 if width <= 256 else 64 if width <= 512 else 32
    block_m = max(triton.next_power_of_2(group), rows)
    if element_bytes == 2 and width <= 128 and block_m == 128:
        return PrefillConfig(
            block_m=128, block_j=64, num_warps=8, num_stages=3 if width <= 64 else 2, products_overlap=True, max_registers=128
        )
    return PrefillConfig(
        block_m=block_m,
        block_j=_keys_a_step(row_bytes, element_bytes),
        num_warps=8 if block_m * width >= 128 * 64 else 4,
        num_stages=_stages(row_bytes, element_bytes),
        products_overlap=width <= 128,
    )


def specialized_prefill_config() -> SpecializedPrefillConfig:
    """Measured on one H200 (`bench_attention.py --sweep-prefill`): the best but for prompts of 64 tokens, by 13 % there."""
    return SPECIALIZED_PREFILL_CONFIGS[0]


def _keys_a_step(row_bytes: int, element_bytes: int) -> int:
    """float32 does without tensor cores: a thread holds whole rows of its operands, so that tiles must be small."""
    return min(max(KEY_TILE_BYTES // row_bytes, 16), 128) if element_bytes == 2 else 16


def _stages(row_bytes: int, element_bytes: int) -> int:
    if element_bytes != 2:
        return 1
    return 3 if row_bytes <= 256 else 2 if row_bytes <= 2048 else 1
