"""Norm, rotary, store and attention of rows with one new token each, in one kernel: the launcher of cuda/decode_attention.cu.

It does what prepare_qkv and paged_attention do one after the other, with the same roundings, for compute capability 9.0,
numbers of 16 bits, head sizes of 64 and 128 that turn whole, up to 8 query heads a kv head, no soft cap. It saves one or two
launches a layer, and begins to read the cache before the kernel in front of it has ended. For that, what it reads of the cache,
the block tables, the context lengths and the slots were written before a kernel that lets the next one start at its own end: by
earlier steps, and by what composes the step (dependent_launch.py).

T tokens, a row each; N query heads, K kv heads, D head_dim, and the letters of paged_attention.py.
"""

from __future__ import annotations

import ctypes

import torch

from .attention_config import FusedDecodeConfig
from .cuda import loader

SOURCE = "decode_attention"
HEAD_DIMS = (64, 128)
MAX_GROUP = 8  # query heads of a kv head
MAX_RESULTS = 65535  # rows times kv heads: a dimension of the grid
TILE_KEYS, ROWS = 16, 8  # as in the source


def fused_decode(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    slots_T: torch.Tensor,
    block_tables_TM: torch.Tensor,
    context_lens_T: torch.Tensor,
    *,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    norm_eps: float,
    scale: float,
    window: int | None,
    sinks_N: torch.Tensor | None,
    config: FusedDecodeConfig,
) -> torch.Tensor:
    """out [T, N, D], contiguous; a token's position is its context length less one, and k and v are stored at its slot.

    Arguments are checked as the two ops check them; besides, ValueError where `unfit_reason` has one. q and k stay as they are.
    """
    reason = unfit_reason(q_TND, k_TKD, v_TKD, cos_PC, k_cache_BLKD, sinks_N)
    if reason is not None:
        raise ValueError(f"fused_decode: {reason}")
    num_rows, num_heads, head_dim = q_TND.shape
    page_len, num_kv_heads = k_cache_BLKD.shape[1:3]
    group = num_heads // num_kv_heads
    kernel = _load(head_dim, group, config.num_warps, config.num_stages, q_TND.dtype, q_TND.device)
    assert kernel is not None  # unfit_reason has loaded one, so there is a compiler or this one in the cache
    out_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
    prepared = (q_TND, k_TKD, v_TKD, cos_PC, sin_PC, q_norm_D, k_norm_D, k_cache_BLKD, v_cache_BLKD)
    tensors = (*prepared, out_TND, block_tables_TM, context_lens_T, slots_T, sinks_N)
    loader.launch(
        kernel,
        (
            *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
            ctypes.c_uint64(q_TND.stride(0)),
            ctypes.c_uint64(k_cache_BLKD.stride(0)),
            ctypes.c_int(k_cache_BLKD.stride(1)),
            ctypes.c_int(k_cache_BLKD.stride(2)),
            ctypes.c_int(block_tables_TM.stride(0)),
            ctypes.c_int(num_kv_heads),
            ctypes.c_int((page_len // TILE_KEYS).bit_length() - 1),
            ctypes.c_int(window or 0),
            ctypes.c_float(scale),
            ctypes.c_float(norm_eps),
        ),
        grid=(config.num_splits, num_rows * num_kv_heads),
        num_threads=32 * config.num_warps,
        shared_bytes=shared_bytes(config, head_dim=head_dim, group=group),
        cluster_size=config.num_splits,
        early_start=True,
    )
    return out_TND


def unfit_reason(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cos_PC: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    sinks_N: torch.Tensor | None,
) -> str | None:
    """Why the kernel cannot run on these, or None. Compiles at the first call."""
    num_rows, num_heads, head_dim = q_TND.shape
    num_kv_heads = k_cache_BLKD.shape[2]
    group = num_heads // num_kv_heads
    parts = (q_TND, k_TKD, v_TKD)
    numbers = (*parts, k_cache_BLKD) if sinks_N is None else (*parts, k_cache_BLKD, sinks_N)
    limits = (
        (head_dim in HEAD_DIMS and cos_PC.shape[1] * 2 == head_dim, f"heads of {head_dim}, {cos_PC.shape[1]} pairs turn"),
        (v_TKD.shape[2] == head_dim, f"values of {v_TKD.shape[2]} numbers, keys of {head_dim}"),
        (group <= MAX_GROUP, f"{group} query heads a kv head, it takes {MAX_GROUP}"),
        (0 < num_rows * num_kv_heads <= MAX_RESULTS, f"{num_rows} rows of {num_kv_heads} kv heads"),
        (all(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in numbers), f"{q_TND.dtype} and {k_cache_BLKD.dtype}"),
        (len({tensor.dtype for tensor in numbers}) == 1, "more than one dtype"),
        (cos_PC.dtype == torch.float32, f"cosines of {cos_PC.dtype}"),
        (len({part.stride(0) for part in parts}) == 1, "q, k and v are not parts of one row"),
        (all(part.stride(1) == head_dim for part in parts), "heads that do not follow one another"),
        (all(tensor.data_ptr() % 16 == 0 for tensor in (*parts, k_cache_BLKD)), "tensors that begin at odd places"),
        (
            all(stride % 8 == 0 for stride in (q_TND.stride(0), *k_cache_BLKD.stride()[:3])),
            "strides that are not multiples of 8",
        ),
    )
    for is_kept, reason in limits:
        if not is_kept:
            return reason
    misplaced = loader.misplaced_reason("the cache", k_cache_BLKD.device)
    if misplaced is not None:
        return misplaced
    if _load(head_dim, group, 4, 3, q_TND.dtype, q_TND.device) is None:
        return f"it cannot be compiled: {loader.unavailable_reason()}"
    return None


def shared_bytes(config: FusedDecodeConfig, *, head_dim: int, group: int) -> int:
    """Dynamic shared memory of a CTA: stages, queries, the new key and value, what the cluster sends; 128 to align them."""
    row = 2 * head_dim
    received = group * head_dim * 4 + config.num_splits * group * 8
    stages = config.num_warps * config.num_stages * 2 * TILE_KEYS * row
    return 128 + stages + (ROWS + 2) * row + received


def _load(
    head_dim: int, group: int, num_warps: int, num_stages: int, dtype: torch.dtype, device: torch.device
) -> loader.Kernel | None:
    sizes = {"HEAD_DIM": head_dim, "GROUP": group, "WARPS": num_warps, "STAGES": num_stages}
    return loader.load(SOURCE, (*sizes.items(), ("FLOAT16", int(dtype == torch.float16))), device.index)
