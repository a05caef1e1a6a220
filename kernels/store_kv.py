"""Writes new keys and values into their pages of the KV cache, in place.

    cache[slot // L, slot % L] = x[t]     rounded to the cache's dtype; a slot below zero is skipped (padding)

T tokens, K kv heads, D numbers of a key, V of a value, B blocks in the cache, L page length in tokens. Where D and V differ,
the caches may be two parts of one: the columns of keys and those of values.
"""

import torch

from .cpu import ops as cpu_ops
from .dispatch import choose_backend


def store_kv(
    k_TKD: torch.Tensor,
    v_TKV: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKV: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Stores each token's key and value at its slot (int64; block_id * L + offset, below B * L: not checked there).

    A step of qkv_prepare, which on CUDA has a kernel for all its steps: here the reference serves every device but the CPU.
    k and v may be strided views whose last dimension is contiguous. Two tokens never share a slot. ValueError where
    shapes or dtypes do not fit.
    """
    check_store_kv(k_TKD, v_TKV, k_cache_BLKD, v_cache_BLKV, slots_T)
    run = cpu_ops.store_kv if choose_backend("store_kv", k_TKD, k_cache_BLKD) == "cpp" else store_kv_ref
    run(k_TKD, v_TKV, k_cache_BLKD, v_cache_BLKV, slots_T)


def store_kv_ref(
    k_TKD: torch.Tensor,
    v_TKV: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKV: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    page_len = k_cache_BLKD.shape[1]
    kept = slots_T >= 0
    slots = slots_T[kept]
    for x, cache in ((k_TKD, k_cache_BLKD), (v_TKV, v_cache_BLKV)):
        cache[slots // page_len, slots % page_len] = x[kept].to(cache.dtype)


def check_store_kv(
    k_TKD: torch.Tensor,
    v_TKV: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKV: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    if k_TKD.dim() != 3 or k_TKD.shape[:2] != v_TKV.shape[:2] or v_TKV.dim() != 3 or k_TKD.dtype != v_TKV.dtype:
        raise ValueError(
            f"store_kv: k {tuple(k_TKD.shape)} {k_TKD.dtype} and v {tuple(v_TKV.shape)} {v_TKV.dtype} must be "
            "[tokens, kv_heads, head_dim] of one dtype"
        )
    if k_cache_BLKD.shape[:-1] != v_cache_BLKV.shape[:-1] or k_cache_BLKD.dtype != v_cache_BLKV.dtype:
        raise ValueError(
            f"store_kv: the caches differ: {tuple(k_cache_BLKD.shape)} {k_cache_BLKD.dtype} and "
            f"{tuple(v_cache_BLKV.shape)} {v_cache_BLKV.dtype}"
        )
    num_tokens, num_heads, _ = k_TKD.shape
    for x, cache in ((k_TKD, k_cache_BLKD), (v_TKV, v_cache_BLKV)):
        if cache.dim() != 4 or cache.shape[2:] != x.shape[1:]:
            raise ValueError(f"store_kv: cache {tuple(cache.shape)} must be [blocks, page_len, {num_heads}, {x.shape[2]}]")
    if slots_T.shape != (num_tokens,) or slots_T.dtype != torch.int64 or not slots_T.is_contiguous():
        raise ValueError(
            f"store_kv: slots {tuple(slots_T.shape)} {slots_T.dtype} must be {num_tokens} contiguous int64 numbers"
        )
    if k_TKD.stride()[2] != 1 or v_TKV.stride()[2] != 1:
        raise ValueError("store_kv: the last dimension of k and v must be contiguous")
    if k_cache_BLKD.stride()[3] != 1 or v_cache_BLKV.stride()[3] != 1:
        raise ValueError("store_kv: the last dimension of the caches must be contiguous")
