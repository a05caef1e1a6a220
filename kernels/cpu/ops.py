"""Calls of the C++ kernels, with the public ops' parameters.

The public ops have checked shapes and dtypes, and `supports` has said yes; here only what C++ needs is arranged: addresses,
strides and empty outputs. Calls cost microseconds, so nothing else belongs here.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import cache

import torch

from . import library

_F32, _BF16 = torch.float32, torch.bfloat16
_WEIGHTS = (_F32, _BF16)
# The dtypes each op's twin takes, in the order in which the op names its tensors to `supports`.
_TWINS: dict[str, set[tuple[torch.dtype, ...]]] = {
    "linear": set(itertools.product([_F32], _WEIGHTS)),
    "paged_attention": {(_F32, _F32)},
}


@cache
def supports(op: str, *dtypes: torch.dtype) -> bool:
    """Whether `op` has a twin for these dtypes on this machine. The first call may compile the library."""
    return dtypes in _TWINS.get(op, ()) and library.load() is not None


@cache
def _kernels() -> ctypes.CDLL:
    loaded = library.load()
    assert loaded is not None, "supports() said no"
    return loaded


def linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    num_rows, size = x_MK.shape
    num_columns = weight_NK.shape[0]
    y_MN = torch.empty(num_rows, num_columns)
    kernels = _kernels()
    run = kernels.pilotfish_linear_f32 if weight_NK.dtype is _F32 else kernels.pilotfish_linear_bf16
    run(
        x_MK.data_ptr(),
        x_MK.stride(0),
        weight_NK.data_ptr(),
        weight_NK.stride(0),
        None if bias_N is None else bias_N.data_ptr(),
        y_MN.data_ptr(),
        num_columns,
        num_rows,
        num_columns,
        size,
        torch.get_num_threads(),
    )
    return y_MN


def paged_attention(
    q_TND: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    *,
    max_query_len: int,  # only a GPU kernel needs to know how many programs to start
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q_TND.shape
    _, page_len, num_kv_heads, _ = k_cache_BLKD.shape
    sinks = None if sinks_N is None else sinks_N.float().contiguous()
    out_TND = torch.empty(num_tokens, num_heads, head_dim)
    _kernels().pilotfish_paged_attention_f32(
        q_TND.data_ptr(),
        *q_TND.stride()[:2],
        k_cache_BLKD.data_ptr(),
        *k_cache_BLKD.stride()[:3],
        v_cache_BLKD.data_ptr(),
        *v_cache_BLKD.stride()[:3],
        block_tables_SM.data_ptr(),
        block_tables_SM.stride(0),
        query_starts_P.data_ptr(),
        context_lens_S.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        out_TND.data_ptr(),
        context_lens_S.shape[0],
        page_len,
        num_kv_heads,
        num_heads // num_kv_heads,
        head_dim,
        scale,
        window or 0,
        soft_cap or 0.0,
        torch.get_num_threads(),
    )
    return out_TND
