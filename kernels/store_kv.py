"""Writes new keys and values into their pages of the KV cache, in place.

    cache[slot // L, slot % L] = x[t]     rounded to the cache's dtype; a slot below zero is skipped (padding)

T tokens, K kv heads, D head_dim, B blocks in the cache, L page length in tokens.
"""

import torch
import triton
import triton.language as tl

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
    run = store_kv_ref
    if backend != "reference":
        run = cpu_ops.store_kv if backend == "cpp" else _store_kv_triton
    run(k_TKD, v_TKD, k_cache_BLKD, v_cache_BLKD, slots_T)


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


@triton.jit
def _copy_heads(
    source, stride_source_head, target, stride_target_head, num_values, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    for start in range(0, num_values, BLOCK):
        index = start + tl.arange(0, BLOCK)
        head, column = index // HEAD_DIM, index % HEAD_DIM
        values = tl.load(source + head * stride_source_head + column, index < num_values)
        values = values.to(target.dtype.element_ty)
        tl.store(target + head * stride_target_head + column, values, index < num_values)


@triton.jit
def _store_kv_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    num_values,
    stride_kt,
    stride_kk,
    stride_vt,
    stride_vk,
    stride_kcb,
    stride_kcl,
    stride_kck,
    stride_vcb,
    stride_vcl,
    stride_vck,
    PAGE_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token copies the key and the value of all its kv heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        page, offset = slot // PAGE_LEN, slot % PAGE_LEN
        k_page = k_cache + page * stride_kcb + offset * stride_kcl
        v_page = v_cache + page * stride_vcb + offset * stride_vcl
        _copy_heads(k + token * stride_kt, stride_kk, k_page, stride_kck, num_values, HEAD_DIM, BLOCK)
        _copy_heads(v + token * stride_vt, stride_vk, v_page, stride_vck, num_values, HEAD_DIM, BLOCK)


def _store_kv_triton(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    num_tokens, num_heads, head_dim = k_TKD.shape
    if k_TKD.numel() == 0:
        return
    _store_kv_kernel[(num_tokens,)](
        k_TKD,
        v_TKD,
        k_cache_BLKD,
        v_cache_BLKD,
        slots_T,
        num_heads * head_dim,
        *k_TKD.stride()[:2],
        *v_TKD.stride()[:2],
        *k_cache_BLKD.stride()[:3],
        *v_cache_BLKD.stride()[:3],
        PAGE_LEN=k_cache_BLKD.shape[1],
        HEAD_DIM=head_dim,
        BLOCK=min(triton.next_power_of_2(num_heads * head_dim), 1024),
    )


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
    num_tokens, num_heads, head_dim = k_TKD.shape
    cache_shape = k_cache_BLKD.shape
    if len(cache_shape) != 4 or cache_shape[2] != num_heads or cache_shape[3] != head_dim:
        raise ValueError(f"store_kv: cache {tuple(cache_shape)} must be [blocks, page_len, {num_heads}, {head_dim}]")
    if slots_T.shape != (num_tokens,) or slots_T.dtype != torch.int64 or not slots_T.is_contiguous():
        raise ValueError(
            f"store_kv: slots {tuple(slots_T.shape)} {slots_T.dtype} must be {num_tokens} contiguous int64 numbers"
        )
    if k_TKD.stride()[2] != 1 or v_TKD.stride()[2] != 1:
        raise ValueError("store_kv: the last dimension of k and v must be contiguous")
    if k_cache_BLKD.stride()[3] != 1 or v_cache_BLKD.stride()[3] != 1:
        raise ValueError("store_kv: the last dimension of the caches must be contiguous")
