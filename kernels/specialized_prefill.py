"""Attention of rows with several queries at the rate of the tensor cores: the launcher of cuda/prefill_attention.cu.

It is the twin of prefill_attention.py on compute capability 9.0, for numbers of 16 bits and head sizes of 64 and 128, without
window, soft cap and sinks: warps of their own copy pages ahead, whole warpgroups multiply and weigh. The grid follows from
shapes, so that a captured CUDA graph serves any lengths; what a row needs is found on the device.

Letters are those of paged_attention.py.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from .attention_config import SpecializedPrefillConfig
from .cuda import loader

SOURCE = "prefill_attention"
HEAD_DIMS = (64, 128)
NUM_THREADS, ROWS, SLOTS = 384, 128, 3  # as in the source, the next ones too: rows of a tile, tiles under way
BOX_KEYS, GROUP_KEYS, HALF = 16, 8, 64  # keys of a box and of a group, numbers that lie together
MAX_SHARED_BYTES = loader.CTA_SHARED_BYTES - 1024  # dynamic ones: beside them there are barriers alone
MAX_GROUP = 128  # query heads of a kv head: the rows of a tile
MIN_QUERIES = 32  # of the longest row: shorter ones leave most of a tile empty


def specialized_prefill(
    out_TND: torch.Tensor,
    q_TND: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    *,
    config: SpecializedPrefillConfig,
    skip_one_query: bool,
    scale: float,
) -> None:
    """Writes the tokens of all rows into `out_TND`, contiguous; with `skip_one_query` only those of rows with several.

    Arguments are checked as paged_attention checks them; besides, ValueError where `unfit_reason` has one.
    """
    reason = unfit_reason(q_TND, k_cache_BLKD, v_cache_BLKD, config=config)
    if reason is not None:
        raise ValueError(f"specialized_prefill: {reason}")
    num_tokens, num_heads, head_dim = q_TND.shape
    num_pages, page_len, num_kv_heads = k_cache_BLKD.shape[:3]
    group, num_rows = num_heads // num_kv_heads, context_lens_S.shape[0]
    kernel = _load(config, head_dim, group, q_TND.dtype, q_TND.device)
    assert kernel is not None  # unfit_reason has loaded it
    queries = ROWS // group
    most_tiles = (num_tokens // queries + num_rows) * num_kv_heads
    loader.launch(
        kernel,
        (
            _query_map(q_TND, group, queries),
            _cache_map(k_cache_BLKD),
            _cache_map(v_cache_BLKD),
            *(ctypes.c_void_p(t.data_ptr()) for t in (out_TND, block_tables_SM, query_starts_P, context_lens_S)),
            ctypes.c_int(num_rows),
            ctypes.c_int(block_tables_SM.stride(0)),
            ctypes.c_int(num_kv_heads),
            ctypes.c_int((page_len // BOX_KEYS).bit_length() - 1),
            ctypes.c_int(num_pages),
            ctypes.c_int(k_cache_BLKD.stride(2) // HALF),
            ctypes.c_int(2 if skip_one_query else 1),
            ctypes.c_float(scale),
        ),
        grid=(min(most_tiles, _num_multiprocessors(q_TND.device)), 1),
        num_threads=NUM_THREADS,
        shared_bytes=shared_bytes(config, head_dim=head_dim),
        early_start=True,
    )


def unfit_reason(
    q_TND: torch.Tensor, k_cache_BLKD: torch.Tensor, v_cache_BLKD: torch.Tensor, *, config: SpecializedPrefillConfig
) -> str | None:
    """Why the kernel cannot run on these, or None. Compiles at the first call."""
    num_heads, head_dim = q_TND.shape[1:]
    group = num_heads // k_cache_BLKD.shape[2]
    tensors = (q_TND, k_cache_BLKD, v_cache_BLKD)
    limits = (
        (head_dim in HEAD_DIMS, f"heads of {head_dim}"),
        (group <= MAX_GROUP, f"{group} query heads a kv head, it takes {MAX_GROUP}"),
        (q_TND.dtype in (torch.bfloat16, torch.float16), f"numbers of {q_TND.dtype}"),
        (len({tensor.dtype for tensor in tensors}) == 1, f"{q_TND.dtype} and {k_cache_BLKD.dtype}"),
        (q_TND.stride(1) == head_dim, "heads of q that do not follow one another"),
        (k_cache_BLKD.stride(2) % HALF == 0, "kv heads at distances that are not multiples of 64"),
        (all(tensor.data_ptr() % 16 == 0 for tensor in tensors), "tensors that begin at odd places"),
        (
            all(stride % 8 == 0 for stride in (q_TND.stride(0), *k_cache_BLKD.stride()[:2])),
            "strides that are not multiples of 8",
        ),
        (shared_bytes(config, head_dim=head_dim) <= MAX_SHARED_BYTES, f"{config} needs too much shared memory"),
    )
    for is_kept, reason in limits:
        if not is_kept:
            return reason
    misplaced = loader.misplaced_reason("the cache", k_cache_BLKD.device)
    if misplaced is not None:
        return misplaced
    if _load(config, head_dim, group, q_TND.dtype, q_TND.device) is None:
        return f"it cannot be compiled: {loader.unavailable_reason()}"
    return None


def shared_bytes(config: SpecializedPrefillConfig, *, head_dim: int) -> int:
    """Dynamic shared memory of a CTA: queries of three tiles, stages of keys and of values; 1024 to align them."""
    row = 2 * head_dim
    return 1024 + SLOTS * ROWS * row + 2 * config.num_stages * config.keys * row


def macros(config: SpecializedPrefillConfig, *, head_dim: int, group: int, dtype: torch.dtype) -> loader.Macros:
    """Of the source's compilation."""
    return (
        ("HEAD_DIM", head_dim),
        ("GROUP", group),
        ("KEYS", config.keys),
        ("STAGES", config.num_stages),
        ("FLOAT16", int(dtype == torch.float16)),
    )


def _load(
    config: SpecializedPrefillConfig, head_dim: int, group: int, dtype: torch.dtype, device: torch.device
) -> loader.Kernel | None:
    return loader.load(SOURCE, macros(config, head_dim=head_dim, group=group, dtype=dtype), device.index)


def _query_map(q_TND: torch.Tensor, group: int, queries: int) -> loader.TensorMap:
    """[64 numbers from there on, token, head of a group, number], in boxes of the tokens of a tile."""
    num_tokens, num_heads, head_dim = q_TND.shape
    shape, strides = (num_heads * head_dim // HALF, num_tokens, group, HALF), (HALF, q_TND.stride(0), head_dim)
    return loader.tensor_map_of(q_TND.data_ptr(), q_TND.dtype, shape, strides, (1, queries, group, HALF))


def _cache_map(cache_BLKD: torch.Tensor) -> loader.TensorMap:
    """[page, group of 8 keys, 64 numbers from there on, key of the group, number], in boxes of 16 keys of one kv head.

    Groups of 8 keys follow each other in shared memory, each with all of its numbers: evenly, also from page to page.
    """
    num_pages, page_len, num_kv_heads, head_dim = cache_BLKD.shape
    stride_page, stride_key, stride_head = cache_BLKD.stride()[:3]
    halves = head_dim // HALF
    shape = (num_pages, page_len // GROUP_KEYS, (num_kv_heads - 1) * stride_head // HALF + halves, GROUP_KEYS, HALF)
    strides = (stride_page, GROUP_KEYS * stride_key, HALF, stride_key)
    box = (1, BOX_KEYS // GROUP_KEYS, halves, GROUP_KEYS, HALF)
    return loader.tensor_map_of(cache_BLKD.data_ptr(), cache_BLKD.dtype, shape, strides, box)


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
