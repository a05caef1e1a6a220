"""Rows of an embedding table, or of a rank's share of one: x[t] = weight[ids[t] - first_id], zeros for ids that lie elsewhere.

The shares' x add up to the whole table's. On the CPU the table stays in the checkpoint's dtype and its rows are widened to
float32 as they are read. T tokens, V rows of the table, H hidden.
"""

import torch
import triton
import triton.language as tl

from .cpu import ops as cpu_ops
from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import choose_backend

_BLOCK = 1024  # numbers a program


def embedding(ids_T: torch.Tensor, weight_VH: torch.Tensor, *, dtype: torch.dtype, first_id: int = 0) -> torch.Tensor:
    """x [T, H] of `dtype`, contiguous. ids are int64. ValueError where shapes or dtypes do not fit."""
    if ids_T.dim() != 1 or ids_T.dtype != torch.int64 or ids_T.stride(0) != 1:
        raise ValueError(f"embedding: ids {tuple(ids_T.shape)} {ids_T.dtype} must be a contiguous int64 vector")
    if weight_VH.dim() != 2 or weight_VH.stride(1) != 1:
        raise ValueError(f"embedding: weight {tuple(weight_VH.shape)} must be [vocabulary, hidden] with contiguous rows")
    backend = choose_backend("embedding", ids_T, weight_VH)
    if backend == "triton":
        return embedding_triton(ids_T, weight_VH, dtype=dtype, first_id=first_id)
    if backend == "cpp" and dtype == torch.float32:
        return cpu_ops.embedding(ids_T, weight_VH, first_id=first_id)
    return embedding_ref(ids_T, weight_VH, dtype=dtype, first_id=first_id)


def embedding_ref(ids_T: torch.Tensor, weight_VH: torch.Tensor, *, dtype: torch.dtype, first_id: int = 0) -> torch.Tensor:
    rows_T = ids_T - first_id
    is_here_T = (rows_T >= 0) & (rows_T < len(weight_VH))
    x_TH = weight_VH.index_select(0, rows_T.where(is_here_T, 0)).to(dtype)
    return x_TH.masked_fill_(~is_here_T.unsqueeze(1), 0)


@triton.jit(do_not_specialize=["first_id", "num_rows"])
def _embedding_kernel(
    ids, weight, x, first_id, num_rows, stride_weight, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, EARLY_START: tl.constexpr
):
    """One program BLOCK numbers of a token."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token) - first_id
    end = tl.where((row >= 0) & (row < num_rows), HIDDEN, 0)
    values = tl.load(weight + row * stride_weight + column, column < end, other=0.0)
    tl.store(x + token * HIDDEN + column, values, column < HIDDEN)


def embedding_triton(ids_T: torch.Tensor, weight_VH: torch.Tensor, *, dtype: torch.dtype, first_id: int = 0) -> torch.Tensor:
    (num_tokens,), (num_rows, hidden) = ids_T.shape, weight_VH.shape
    x_TH = torch.empty(num_tokens, hidden, dtype=dtype, device=ids_T.device)
    if x_TH.numel() > 0:
        block = min(triton.next_power_of_2(hidden), _BLOCK)
        _embedding_kernel[(num_tokens, triton.cdiv(hidden, block))](
            ids_T,
            weight_VH,
            x_TH,
            first_id,
            num_rows,
            weight_VH.stride(0),
            HIDDEN=hidden,
            BLOCK=block,
            num_warps=4,
            **launch_options(ids_T.device),
        )
    return x_TH
