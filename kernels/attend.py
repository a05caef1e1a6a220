"""From packed q, k, v to attention: norm of each head, rotary, the store into the cache, and attention over what it then holds.

    prepare_qkv, then paged_attention

by one kernel (fused_decode.py) where every row has one new token and that kernel serves; else by the two ops.

T tokens, N query heads, K kv heads, D head_dim, and the letters of both ops.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from .attention_config import fused_decode_config
from .dispatch import choose_backend, kernel_mode
from .fused_decode import fused_decode, unfit_reason
from .paged_attention import check_paged_attention, paged_attention
from .qkv_prepare import check_prepare_qkv, prepare_qkv

logger = logging.getLogger(__name__)


def prepare_and_attend(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cos_PC: torch.Tensor,
    sin_PC: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    slots_T: torch.Tensor,
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    *,
    max_query_len: int,
    min_query_len: int,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    norm_eps: float,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks_N: torch.Tensor | None,
) -> torch.Tensor:
    """out [T, N, D]. A row's tokens stand at the last positions of its context. Afterwards q and k are scratch.

    ValueError where shapes or dtypes do not fit, as of the two ops.
    """
    is_decode = max_query_len == min_query_len == 1 and soft_cap is None and kernel_mode() == "auto"
    if is_decode and q_TND.is_cuda and choose_backend("prepare_and_attend", q_TND, k_cache_BLKD) == "triton":
        check_prepare_qkv(
            q_TND, k_TKD, v_TKD, cos_PC, sin_PC, positions_T, k_cache_BLKD, v_cache_BLKD, slots_T, q_norm_D, k_norm_D
        )
        check_paged_attention(
            q_TND,
            k_cache_BLKD,
            v_cache_BLKD,
            block_tables_SM,
            query_starts_P,
            context_lens_S,
            sinks_N,
            max_query_len=1,
            scale=scale,
            window=window,
            soft_cap=None,
        )
        reason = unfit_reason(q_TND, k_TKD, v_TKD, cos_PC, k_cache_BLKD, sinks_N)
        if reason is None:
            config = fused_decode_config(num_rows=q_TND.shape[0], num_kv_heads=k_cache_BLKD.shape[2])
            return fused_decode(
                q_TND,
                k_TKD,
                v_TKD,
                cos_PC,
                sin_PC,
                k_cache_BLKD,
                v_cache_BLKD,
                slots_T,
                block_tables_SM,
                context_lens_S,
                q_norm_D=q_norm_D,
                k_norm_D=k_norm_D,
                norm_eps=norm_eps,
                scale=scale,
                window=window,
                sinks_N=sinks_N,
                config=config,
            )
        _say_once(reason)
    prepare_qkv(
        q_TND,
        k_TKD,
        v_TKD,
        cos_PC,
        sin_PC,
        positions_T,
        k_cache_BLKD,
        v_cache_BLKD,
        slots_T,
        q_norm_D=q_norm_D,
        k_norm_D=k_norm_D,
        norm_eps=norm_eps,
    )
    return paged_attention(
        q_TND,
        k_cache_BLKD,
        v_cache_BLKD,
        block_tables_SM,
        query_starts_P,
        context_lens_S,
        max_query_len=max_query_len,
        min_query_len=min_query_len,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
    )


@cache
def _say_once(reason: str) -> None:
    """Once a reason."""
    logger.info("decode steps take two kernels and more instead of decode_attention.cu: %s", reason)
