"""Rotary position embedding, in place, half-split (NeoX) convention.

For a head's first R dimensions, split as x1 = x[:R/2] and x2 = x[R/2:R], at position p:

    x1' = x1 * cos[p] - x2 * sin[p]
    x2' = x2 * cos[p] + x1 * sin[p]       float32 arithmetic, one rounding to the dtype of x

Dimensions from R to D stay as they are. T tokens, N query heads, K kv heads, D head_dim, R rotary dims (even, <= D), P
positions in the table, C = R / 2. The tables are float32. Source: Su et al. 2021, "RoFormer", as rotated by GPT-NeoX.
"""

from __future__ import annotations

import torch

from .cpu import ops as cpu_ops
from .dispatch import choose_backend

# Largest |x' - reference| for inputs of order one: (relative, absolute).
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1.6e-2, 8e-3)}


def apply_rotary(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
) -> None:
    """Rotates q and k in place by their tokens' positions (int32 or int64, each below P: not checked on the device).

    q and k may be strided views of a packed qkv whose last dimension is contiguous. ValueError where shapes or dtypes
    do not fit.
    """
    _check(q_TND, k_TKD, cos_PC, sin_PC, positions_T)
    backend = choose_backend("apply_rotary", q_TND, cos_PC)
    if backend == "cpp":
        cpu_ops.apply_rotary(q_TND, k_TKD, cos_PC, sin_PC, positions_T)
    else:
        apply_rotary_ref(q_TND, k_TKD, cos_PC, sin_PC, positions_T)


def apply_rotary_ref(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
) -> None:
    half = cos_PC.shape[1]
    cos_T1C = cos_PC[positions_T.long()].float().unsqueeze(1)
    sin_T1C = sin_PC[positions_T.long()].float().unsqueeze(1)
    for x in (q_TND, k_TKD):
        x1, x2 = x[..., :half].float(), x[..., half : 2 * half].float()
        x[..., :half] = x1 * cos_T1C - x2 * sin_T1C
        x[..., half : 2 * half] = x2 * cos_T1C + x1 * sin_T1C


def _check(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
) -> None:
    if q_TND.dim() != 3 or k_TKD.dim() != 3 or q_TND.shape[::2] != k_TKD.shape[::2] or q_TND.dtype != k_TKD.dtype:
        raise ValueError(
            f"apply_rotary: q {tuple(q_TND.shape)} {q_TND.dtype} and k {tuple(k_TKD.shape)} {k_TKD.dtype} must be "
            "[tokens, heads, head_dim] of one dtype"
        )
    if cos_PC.dim() != 2 or cos_PC.shape != sin_PC.shape or 2 * cos_PC.shape[1] > q_TND.shape[2]:
        raise ValueError(
            f"apply_rotary: cos {tuple(cos_PC.shape)} and sin {tuple(sin_PC.shape)} must be [positions, rotary_dims / 2] "
            f"with rotary_dims at most head_dim {q_TND.shape[2]}"
        )
    if cos_PC.dtype != torch.float32 or sin_PC.dtype != torch.float32:
        raise ValueError(f"apply_rotary: cos and sin must be float32, not {cos_PC.dtype} and {sin_PC.dtype}")
    if positions_T.shape != q_TND.shape[:1] or positions_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"apply_rotary: positions {tuple(positions_T.shape)} {positions_T.dtype} must be {q_TND.shape[0]} integers"
        )
    if q_TND.stride(2) != 1 or k_TKD.stride(2) != 1:
        raise ValueError("apply_rotary: the last dimension of q and k must be contiguous")
