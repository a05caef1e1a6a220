"""Everything between the packed q, k, v of a layer and its attention: norm of each head, rotary, and the store into the cache.

    q = rotary(rms_norm(q))                   in place
    cache[slot] = rotary(rms_norm(k)), v      a slot below zero is skipped (padding)

The norms are optional. Rounding is that of the three ops one after another (rms_norm, rotary, store_kv): the norm's result
and the rotated values are each rounded to the dtype of q. On CUDA it is one kernel; elsewhere it is the three ops.

T tokens, N query heads, K kv heads, D head_dim of q and k, V of v (see store_kv.py), P positions in the table, C = rotary
dims / 2, B blocks in the cache, L page length in tokens.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import choose_backend
from .rms_norm import TOLERANCE, rms_norm, rms_norm_ref
from .rotary import apply_rotary, apply_rotary_ref, check_rotary
from .store_kv import check_store_kv, store_kv, store_kv_ref

__all__ = ["TOLERANCE", "prepare_qkv", "prepare_qkv_ref"]  # the norm's roundings outweigh the rotation's
_BLOCK_HEADS = 8


def prepare_qkv(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKV: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKV: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    norm_eps: float,
) -> None:
    """Rewrites q in place and stores k and v at their tokens' slots (int64; block_id * L + offset).

    q, k and v may be strided views of a packed qkv whose last dimension is contiguous. Afterwards k is scratch: some
    backends rotate it in place. Positions (int32 or int64) lie below P, slots below B * L, and two tokens never share a
    slot: none of this is checked on the device. `norm_eps` is that of both norms, which come together or not at all.
    ValueError where shapes or dtypes do not fit.
    """
    tensors = (q_TND, k_TKD, v_TKV, cos_PC, sin_PC, positions_T, k_cache_BLKD, v_cache_BLKV, slots_T)
    if q_TND.is_cuda and choose_backend("prepare_qkv", q_TND, k_cache_BLKD) == "triton":
        check_prepare_qkv(*tensors, q_norm_D, k_norm_D)
        _prepare_qkv_triton(*tensors, q_norm_D=q_norm_D, k_norm_D=k_norm_D, norm_eps=norm_eps)
    else:
        _check_norms(q_TND, k_TKD, q_norm_D, k_norm_D)
        _one_after_another((rms_norm, apply_rotary, store_kv), *tensors, norms=(q_norm_D, k_norm_D), norm_eps=norm_eps)


def prepare_qkv_ref(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKV: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKV: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    norm_eps: float,
) -> None:
    tensors = (q_TND, k_TKD, v_TKV, cos_PC, sin_PC, positions_T, k_cache_BLKD, v_cache_BLKV, slots_T)
    references = (rms_norm_ref, apply_rotary_ref, store_kv_ref)
    _one_after_another(references, *tensors, norms=(q_norm_D, k_norm_D), norm_eps=norm_eps)


def _one_after_another(
    ops: tuple[Callable, Callable, Callable],
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKV: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKV: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    norm_eps: float,
) -> None:
    norm, rotate, store = ops
    q_norm_D, k_norm_D = norms
    if q_norm_D is None or k_norm_D is None:
        rotate(q_TND, k_TKD, cos_PC, sin_PC, positions_T)
    else:
        normed_TND, k_TKD = norm(q_TND, q_norm_D, norm_eps), norm(k_TKD, k_norm_D, norm_eps)
        rotate(normed_TND, k_TKD, cos_PC, sin_PC, positions_T)
        q_TND.copy_(normed_TND)
    store(k_TKD, v_TKV, k_cache_BLKD, v_cache_BLKV, slots_T)


@triton.jit
def _normed(x, scale, weight, column, inside, HAS_NORM: tl.constexpr):
    """x in float32, as the norm leaves it: rounded before and after the weight."""
    wide = x.to(tl.float32)
    if HAS_NORM:
        gain = tl.load(weight + column, inside, other=0.0).to(tl.float32)
        wide = ((wide * scale).to(x.dtype).to(tl.float32) * gain).to(x.dtype).to(tl.float32)
    return wide


@triton.jit
def _rotate_heads(
    source,
    stride_source,
    target,
    stride_target,
    first_head,
    end_head,
    cos_row,
    sin_row,
    weight,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WRITE_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Norm and rotation of a block of heads: the pairs as two tiles, what is not rotated as a third.

    A thread owns both members of a pair, so that source and target may be the same.
    """
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    in_half, in_rest = column < HALF, rest < HEAD_DIM
    x = source + head * stride_source
    x1 = tl.load(x + column, (head < end_head) & in_half, other=0.0)
    x2 = tl.load(x + HALF + column, (head < end_head) & in_half, other=0.0)
    cos = tl.load(cos_row + column, in_half, other=0.0)
    sin = tl.load(sin_row + column, in_half, other=0.0)
    if WRITE_REST:
        x3 = tl.load(x + rest, (head < end_head) & in_rest, other=0.0)
    scale = 1.0
    if HAS_NORM:
        wide1, wide2 = x1.to(tl.float32), x2.to(tl.float32)
        squares = tl.sum(wide1 * wide1 + wide2 * wide2, axis=1)
        if WRITE_REST:
            wide3 = x3.to(tl.float32)
            squares += tl.sum(wide3 * wide3, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    n1 = _normed(x1, scale, weight, column, in_half, HAS_NORM)
    n2 = _normed(x2, scale, weight, HALF + column, in_half, HAS_NORM)
    y = target + head * stride_target
    y1, y2 = (n1 * cos - n2 * sin).to(x1.dtype), (n2 * cos + n1 * sin).to(x1.dtype)
    tl.store(y + column, y1.to(target.dtype.element_ty), (head < end_head) & in_half)
    tl.store(y + HALF + column, y2.to(target.dtype.element_ty), (head < end_head) & in_half)
    if WRITE_REST:
        y3 = _normed(x3, scale, weight, rest, in_rest, HAS_NORM).to(x1.dtype)
        tl.store(y + rest, y3.to(target.dtype.element_ty), (head < end_head) & in_rest)


@triton.jit
def _copy_heads(
    source,
    stride_source,
    target,
    stride_target,
    first_head,
    end_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (head < end_head) & (column < HEAD_DIM)
    values = tl.load(source + head * stride_source + column, inside)
    tl.store(target + head * stride_target + column, values.to(target.dtype.element_ty), inside)


@triton.jit
def _prepare_qkv_kernel(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    k_cache,
    v_cache,
    slots,
    q_norm,
    k_norm,
    eps,
    num_q_heads,
    num_k_heads,
    stride_qt,
    stride_qn,
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
    VALUE_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    """One program a token and block of heads: first the blocks of q, then those of k, then those of v."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_q_blocks, num_k_blocks = tl.cdiv(num_q_heads, BLOCK_HEADS), tl.cdiv(num_k_heads, BLOCK_HEADS)
    slot = tl.load(slots + token)
    position = tl.load(positions + token).to(tl.int64)
    page, offset = slot // PAGE_LEN, slot % PAGE_LEN
    end_head = tl.where(slot >= 0, num_k_heads, 0)  # of padding no head is read or stored
    cos_row, sin_row = cos + position * HALF, sin + position * HALF
    HAS_REST: tl.constexpr = HEAD_DIM > 2 * HALF
    if block < num_q_blocks:
        _rotate_heads(
            q + token * stride_qt,
            stride_qn,
            q + token * stride_qt,
            stride_qn,
            block * BLOCK_HEADS,
            num_q_heads,
            cos_row,
            sin_row,
            q_norm,
            eps,
            HEAD_DIM,
            HALF,
            HAS_NORM,
            HAS_NORM and HAS_REST,  # without a norm the rest of q is there already
            BLOCK_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )
    elif block < num_q_blocks + num_k_blocks:
        _rotate_heads(
            k + token * stride_kt,
            stride_kk,
            k_cache + page * stride_kcb + offset * stride_kcl,
            stride_kck,
            (block - num_q_blocks) * BLOCK_HEADS,
            end_head,
            cos_row,
            sin_row,
            k_norm,
            eps,
            HEAD_DIM,
            HALF,
            HAS_NORM,
            HAS_REST,
            BLOCK_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        _copy_heads(
            v + token * stride_vt,
            stride_vk,
            v_cache + page * stride_vcb + offset * stride_vcl,
            stride_vck,
            (block - num_q_blocks - num_k_blocks) * BLOCK_HEADS,
            end_head,
            VALUE_DIM,
            BLOCK_HEADS,
            BLOCK_DIM,
        )


def _prepare_qkv_triton(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKV: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKV: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    norm_eps: float,
) -> None:
    num_tokens, num_q_heads, head_dim = q_TND.shape
    num_k_heads, half = k_TKD.shape[1], cos_PC.shape[1]
    if num_tokens == 0:
        return
    block_heads = min(triton.next_power_of_2(max(num_q_heads, num_k_heads)), _BLOCK_HEADS)
    block_half = triton.next_power_of_2(max(half, 1))
    num_blocks = triton.cdiv(num_q_heads, block_heads) + 2 * triton.cdiv(num_k_heads, block_heads)
    _prepare_qkv_kernel[(num_tokens, num_blocks)](
        q_TND,
        k_TKD,
        v_TKV,
        cos_PC,
        sin_PC,
        positions_T,
        k_cache_BLKD,
        v_cache_BLKV,
        slots_T,
        q_norm_D,
        k_norm_D,
        norm_eps,
        num_q_heads,
        num_k_heads,
        *q_TND.stride()[:2],
        *k_TKD.stride()[:2],
        *v_TKV.stride()[:2],
        *k_cache_BLKD.stride()[:3],
        *v_cache_BLKV.stride()[:3],
        PAGE_LEN=k_cache_BLKD.shape[1],
        HEAD_DIM=head_dim,
        VALUE_DIM=v_TKV.shape[2],
        HALF=half,
        HAS_NORM=q_norm_D is not None,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        BLOCK_REST=triton.next_power_of_2(max(head_dim - 2 * half, 1)),
        BLOCK_DIM=triton.next_power_of_2(v_TKV.shape[2]),
        num_warps=min(max(block_heads * block_half // 256, 1), 4),  # 16 bytes of each half a thread, in bfloat16
        enable_fp_fusion=False,  # a fused multiply-add would round otherwise than the reference
        **launch_options(q_TND.device),
    )


def check_prepare_qkv(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKV: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKV: torch.Tensor,
    slots_T: torch.Tensor,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
) -> None:
    """ValueError where `prepare_qkv` takes no such arguments."""
    _check_norms(q_TND, k_TKD, q_norm_D, k_norm_D)
    check_rotary(q_TND, k_TKD, cos_PC, sin_PC, positions_T)
    check_store_kv(k_TKD, v_TKV, k_cache_BLKD, v_cache_BLKV, slots_T)


def _check_norms(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, q_norm_D: torch.Tensor | None, k_norm_D: torch.Tensor | None
) -> None:
    if (q_norm_D is None) != (k_norm_D is None):
        raise ValueError("prepare_qkv: q_norm and k_norm come together or not at all")
    for x, weight_D in ((q_TND, q_norm_D), (k_TKD, k_norm_D)):
        if weight_D is not None and (weight_D.shape != x.shape[-1:] or weight_D.stride(0) != 1):
            raise ValueError(f"prepare_qkv: norm weight {tuple(weight_D.shape)} must be {x.shape[-1]} contiguous numbers")
