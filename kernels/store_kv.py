"""Writes new keys and values into their pages of the KV cache, in place.

    cache[slot // L, slot % L] = x[t]     rounded to the cache's dtype; a slot below zero is skipped (padding)

T tokens, K kv heads, D head_dim, B blocks in the cache, L page length in tokens.
"""

from __future__ import annotations

import torch

from .cpu import ops as cpu_ops
from .dispatch import choose_backend


def store_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Stores each token's key and value at its slot (int64; block_id * L + offset, below B * L: not checked there).

    k and v may be strided views whose last dimension is contiguous. Two tokens never share a slot. ValueError where
    shapes or dtypes do not fit.
    """
    _check(k_TKD, v_TKD, k_cache_BLKD, v_cache_BLKD, slots_T)
    backend = choose_backend("store_kv", k_TKD, k_cache_BLKD)
    if backend == "cpp":
        cpu_ops.store_kv(k_TKD, v_TKD, k_cache_BLKD, v_cache_BLKD, slots_T)
    else:
        store_kv_ref(k_TKD, v_TKD, k_cache_BLKD, v_cache_BLKD, slots_T)


def store_kv_ref(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    page_len = k_cache_BLKD.shape[1]
    kept = slots_T >= 0
    slots = slots_T[kept]
    for x, cache in ((k_TKD, k_cache_BLKD), (v_TKD, v_cache_BLKD)):
        cache[slots // page_len, slots % page_len] = x[kept].to(cache.dtype)


def _check(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    if k_TKD.dim() != 3 or k_TKD.shape != v_TKD.shape or k_TKD.dtype != v_TKD.dtype:
        raise ValueError(
            f"store_kv: k {tuple(k_TKD.shape)} {k_TKD.dtype} and v {tuple(v_TKD.shape)} {v_TKD.dtype} must be "
            "[tokens, kv_heads, head_dim] of one dtype"
        )
    if k_cache_BLKD.shape != v_cache_BLKD.shape or k_cache_BLKD.dtype != v_cache_BLKD.dtype:
        raise ValueError(
            f"store_kv: the caches differ: {tuple(k_cache_BLKD.shape)} {k_cache_BLKD.dtype} and "
            f"{tuple(v_cache_BLKD.shape)} {v_cache_BLKD.dtype}"
        )
    if k_cache_BLKD.dim() != 4 or k_cache_BLKD.shape[2:] != k_TKD.shape[1:]:
        raise ValueError(
            f"store_kv: cache {tuple(k_cache_BLKD.shape)} must be [blocks, page_len, {k_TKD.shape[1]}, {k_TKD.shape[2]}]"
        )
    if slots_T.shape != k_TKD.shape[:1] or slots_T.dtype != torch.int64:
        raise ValueError(
            f"store_kv: slots {tuple(slots_T.shape)} {slots_T.dtype} must be {k_TKD.shape[0]} int64 numbers"
        )
    if k_TKD.stride(2) != 1 or v_TKD.stride(2) != 1 or k_cache_BLKD.stride(3) != 1 or v_cache_BLKD.stride(3) != 1:
        raise ValueError("store_kv: the last dimension of k, v and the caches must be contiguous")
