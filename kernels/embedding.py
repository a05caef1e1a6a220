"""Rows of an embedding table: x[t] = weight[ids[t]], in the dtype of the computation.

On the CPU the table stays in the checkpoint's dtype and its rows are widened to float32 as they are read. On CUDA torch does
the work. T tokens, V vocabulary, H hidden.
"""

import torch
import torch.nn.functional as F

from .cpu import ops as cpu_ops
from .dispatch import choose_backend


def embedding(ids_T: torch.Tensor, weight_VH: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """x [T, H] of `dtype`, contiguous. ids int64, each in 0..V-1: not checked. ValueError where shapes do not fit."""
    if ids_T.dim() != 1 or ids_T.dtype != torch.int64 or ids_T.stride(0) != 1:
        raise ValueError(f"embedding: ids {tuple(ids_T.shape)} {ids_T.dtype} must be a contiguous int64 vector")
    if weight_VH.dim() != 2 or weight_VH.stride(1) != 1:
        raise ValueError(f"embedding: weight {tuple(weight_VH.shape)} must be [vocabulary, hidden] with contiguous rows")
    if dtype == torch.float32 and choose_backend("embedding", ids_T, weight_VH) == "cpp":
        return cpu_ops.embedding(ids_T, weight_VH)
    return embedding_ref(ids_T, weight_VH, dtype=dtype)


def embedding_ref(ids_T: torch.Tensor, weight_VH: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    return F.embedding(ids_T, weight_VH).to(dtype)
