"""Rotary position embedding, in place, half-split (NeoX) convention.

For a head's first R dimensions, split as x1 = x[:R/2] and x2 = x[R/2:R], at position p:

    x1' = x1 * cos[p] - x2 * sin[p]
    x2' = x2 * cos[p] + x1 * sin[p]       float32 arithmetic, one rounding to the dtype of x

Dimensions from R to D stay as they are. T tokens, N query heads, K kv heads, D head_dim, R rotary dims (even, <= D), P
positions in the table, C = R / 2. The tables are float32. Source: Su et al. 2021, "RoFormer", as rotated by GPT-NeoX.
"""

import torch

from .cpu import ops as cpu_ops
from .dispatch import choose_backend


def apply_rotary(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
) -> None:
    """Rotates q and k in place by their tokens' positions (int32 or int64, each below P: not checked on the device).

    A step of qkv_prepare, which on CUDA has a kernel for all its steps: here the reference serves every device but the CPU.
    q and k may be strided views of a packed qkv whose last dimension is contiguous. ValueError where shapes or dtypes
    do not fit.
    """
    check_rotary(q_TND, k_TKD, cos_PC, sin_PC, positions_T)
    run = cpu_ops.apply_rotary if choose_backend("apply_rotary", q_TND, cos_PC) == "cpp" else apply_rotary_ref
    run(q_TND, k_TKD, cos_PC, sin_PC, positions_T)


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
        # Both sides first: in float32 x1 and x2 are views of what is written.
        rotated = torch.cat([x1 * cos_T1C - x2 * sin_T1C, x2 * cos_T1C + x1 * sin_T1C], dim=-1)
        x[..., : 2 * half] = rotated


def check_rotary(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
) -> None:
    q_shape, k_shape, table_shape = q_TND.shape, k_TKD.shape, cos_PC.shape
    if len(q_shape) != 3 or len(k_shape) != 3 or q_shape[0] != k_shape[0] or q_shape[2] != k_shape[2]:
        raise ValueError(f"apply_rotary: q {tuple(q_shape)} and k {tuple(k_shape)} must be [tokens, heads, head_dim]")
    if q_TND.dtype != k_TKD.dtype:
        raise ValueError(f"apply_rotary: q {q_TND.dtype} and k {k_TKD.dtype} must be of one dtype")
    if len(table_shape) != 2 or table_shape != sin_PC.shape or 2 * table_shape[1] > q_shape[2]:
        raise ValueError(
            f"apply_rotary: cos {tuple(table_shape)} and sin {tuple(sin_PC.shape)} must be [positions, rotary_dims / 2] "
            f"with rotary_dims at most head_dim {q_shape[2]}"
        )
    if cos_PC.dtype != torch.float32 or sin_PC.dtype != torch.float32:
        raise ValueError(f"apply_rotary: cos and sin must be float32, not {cos_PC.dtype} and {sin_PC.dtype}")
    if positions_T.shape != (q_shape[0],) or positions_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"apply_rotary: positions {tuple(positions_T.shape)} {positions_T.dtype} must be {q_shape[0]} integers"
        )
    if q_TND.stride()[2] != 1 or k_TKD.stride()[2] != 1:
        raise ValueError("apply_rotary: the last dimension of q and k must be contiguous")
    if not (cos_PC.is_contiguous() and sin_PC.is_contiguous() and positions_T.is_contiguous()):
        raise ValueError("apply_rotary: cos, sin and positions must be contiguous")
