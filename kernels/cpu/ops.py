"""Calls of the C++ kernels, with the public ops' parameters.

The public ops have checked shapes and dtypes, and `supports` has said yes; here only what C++ needs is arranged: addresses,
strides and empty outputs. Calls cost microseconds, so nothing else belongs here.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch

from . import library
from .library import kernels
from .sampling_ops import apply_penalties, gather_logprobs, race, sample
from .threads import num_threads

__all__ = [
    "apply_penalties",
    "apply_rotary",
    "embedding",
    "gated_activation",
    "gather_logprobs",
    "linear",
    "moe_mlp",
    "paged_attention",
    "race",
    "rms_norm",
    "route_tokens",
    "sample",
    "store_kv",
    "supports",
]

_F32, _BF16 = torch.float32, torch.bfloat16
_WEIGHTS = (_F32, _BF16)
_ACTIVATION_NUMBERS = {"silu": 0, "gelu_tanh": 1}  # as in gated_activation.h
# The dtypes each op's twin takes, in the order in which the op names its tensors to `supports`.
_TWINS: dict[str, set[tuple[torch.dtype, ...]]] = {
    "embedding": set(itertools.product([torch.int64], _WEIGHTS)),
    "linear": set(itertools.product([_F32], _WEIGHTS)),
    "rms_norm": set(itertools.product([_F32], _WEIGHTS)),
    "apply_rotary": {(_F32, _F32)},
    "gated_activation": {(_F32,)},
    "store_kv": {(_F32, _F32)},
    "paged_attention": {(_F32, _F32)},
    "route_tokens": {(_F32,)},
    "moe_mlp": {(_F32, dtype, dtype) for dtype in _WEIGHTS},
    "sample": {(_F32,)},
    "race_shard": {(_F32,)},
    "apply_penalties": {(_F32,)},
    "gather_logprobs": {(_F32, torch.int64)},
}


@cache
def supports(op: str, *dtypes: torch.dtype) -> bool:
    """Whether `op` has a twin for these dtypes on this machine. The first call may compile the library."""
    return dtypes in _TWINS.get(op, ()) and library.load() is not None


def embedding(ids_T: torch.Tensor, weight_VH: torch.Tensor, *, first_id: int) -> torch.Tensor:
    num_tokens, size = ids_T.shape[0], weight_VH.shape[1]
    x_TH = torch.empty(num_tokens, size)
    run = kernels().pilotfish_embedding_f32 if weight_VH.dtype is _F32 else kernels().pilotfish_embedding_bf16
    run(
        ids_T.data_ptr(),
        first_id,
        weight_VH.data_ptr(),
        len(weight_VH),
        weight_VH.stride(0),
        x_TH.data_ptr(),
        num_tokens,
        size,
        num_threads(),
    )
    return x_TH


def linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    num_rows, size = x_MK.shape
    num_columns = weight_NK.shape[0]
    y_MN = torch.empty(num_rows, num_columns)
    run = kernels().pilotfish_linear_f32 if weight_NK.dtype is _F32 else kernels().pilotfish_linear_bf16
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
        num_threads(),
    )
    return y_MN


def rms_norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, *, residual_TH: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    shape = x_TH.shape
    hidden = shape[-1]
    if len(shape) == 2:
        num_outer, num_inner, outer_stride, inner_stride = shape[0], 1, x_TH.stride(0), 0
    else:
        x_TH = x_TH.reshape(-1, shape[-2] if len(shape) > 2 else 1, hidden)
        num_outer, num_inner, _ = x_TH.shape
        outer_stride, inner_stride, _ = x_TH.stride()
    y_TH = torch.empty(shape)
    new_residual_TH = None if residual_TH is None else torch.empty(shape)
    run = kernels().pilotfish_rms_norm_f32 if weight_H.dtype is _F32 else kernels().pilotfish_rms_norm_bf16
    run(
        x_TH.data_ptr(),
        num_outer,
        outer_stride,
        num_inner,
        inner_stride,
        None if residual_TH is None else residual_TH.data_ptr(),
        0 if residual_TH is None else residual_TH.stride(0),
        weight_H.data_ptr(),
        eps,
        y_TH.data_ptr(),
        None if new_residual_TH is None else new_residual_TH.data_ptr(),
        hidden,
        num_threads(),
    )
    return y_TH if new_residual_TH is None else (y_TH, new_residual_TH)


def apply_rotary(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, cos_PC: torch.Tensor, sin_PC: torch.Tensor, positions_T: torch.Tensor
) -> None:
    num_tokens, num_q_heads, _ = q_TND.shape
    q_token_stride, q_head_stride, _ = q_TND.stride()
    k_token_stride, k_head_stride, _ = k_TKD.stride()
    kernels().pilotfish_apply_rotary(
        q_TND.data_ptr(),
        q_token_stride,
        q_head_stride,
        num_q_heads,
        k_TKD.data_ptr(),
        k_token_stride,
        k_head_stride,
        k_TKD.shape[1],
        cos_PC.data_ptr(),
        cos_PC.stride(0),
        sin_PC.data_ptr(),
        sin_PC.stride(0),
        positions_T.data_ptr(),
        positions_T.itemsize,
        num_tokens,
        cos_PC.shape[1],
        num_threads(),
    )


def gated_activation(gate_up_TU: torch.Tensor, activation: str) -> torch.Tensor:
    num_rows, size = gate_up_TU.shape[0], gate_up_TU.shape[1] // 2
    y_TF = torch.empty(num_rows, size)
    kernels().pilotfish_gated_activation(
        gate_up_TU.data_ptr(),
        gate_up_TU.stride(0),
        y_TF.data_ptr(),
        num_rows,
        size,
        _ACTIVATION_NUMBERS[activation],
        num_threads(),
    )
    return y_TF


def store_kv(
    k_TKD: torch.Tensor,
    v_TKV: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKV: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    num_tokens, num_heads, head_dim = k_TKD.shape
    kernels().pilotfish_store_kv(
        k_TKD.data_ptr(),
        *k_TKD.stride()[:2],
        v_TKV.data_ptr(),
        *v_TKV.stride()[:2],
        k_cache_BLKD.data_ptr(),
        *k_cache_BLKD.stride()[:3],
        v_cache_BLKV.data_ptr(),
        *v_cache_BLKV.stride()[:3],
        slots_T.data_ptr(),
        num_tokens,
        k_cache_BLKD.shape[1],
        num_heads,
        head_dim,
        v_TKV.shape[2],
        num_threads(),
    )


def paged_attention(
    q_TND: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    *,
    max_query_len: int,  # noqa: ARG001 - a GPU kernel needs it to start enough programs
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q_TND.shape
    _, page_len, num_kv_heads, _ = k_cache_BLKD.shape
    sinks = None if sinks_N is None else sinks_N.float().contiguous()
    out_TND = torch.empty(num_tokens, num_heads, head_dim)
    kernels().pilotfish_paged_attention_f32(
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
        num_threads(),
    )
    return out_TND


def route_tokens(logits_TE: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits_TE.shape
    weights_TC = torch.empty(num_tokens, top_k)
    experts_TC = torch.empty(num_tokens, top_k, dtype=torch.int32)
    kernels().pilotfish_route_tokens(
        logits_TE.data_ptr(),
        logits_TE.stride(0),
        weights_TC.data_ptr(),
        experts_TC.data_ptr(),
        num_tokens,
        num_experts,
        top_k,
        renormalize,
        num_threads(),
    )
    return weights_TC, experts_TC


def moe_mlp(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    num_experts, hidden, intermediate = down_weight_EHF.shape
    num_tokens, top_k = experts_TC.shape
    weights_TC, experts_TC = weights_TC.contiguous(), experts_TC.contiguous()
    out_TH = torch.empty(num_tokens, hidden)
    run = kernels().pilotfish_moe_mlp_f32 if down_weight_EHF.dtype is _F32 else kernels().pilotfish_moe_mlp_bf16
    run(
        x_TH.data_ptr(),
        x_TH.stride(0),
        gate_up_weight_EUH.data_ptr(),
        *gate_up_weight_EUH.stride()[:2],
        down_weight_EHF.data_ptr(),
        *down_weight_EHF.stride()[:2],
        weights_TC.data_ptr(),
        experts_TC.data_ptr(),
        out_TH.data_ptr(),
        num_tokens,
        top_k,
        num_experts,
        hidden,
        intermediate,
        _ACTIVATION_NUMBERS[activation],
        num_threads(),
    )
    return out_TH
