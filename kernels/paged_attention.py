"""Causal attention over a paged KV cache: prefill and decode rows of different lengths in one call.

Row s has query_len = query_starts[s + 1] - query_starts[s] queries, and context_lens[s] keys, the row's new tokens
included (they are stored already). Its query i sits at position p = context_len - query_len + i and sees the keys at
positions (p - window, p]; key j lies at block block_tables[s, j // L], offset j % L. Query head n reads kv head
n // (N / K).

    score = scale * q . k ;   with a soft cap c:   score = c * tanh(score / c)
    out   = sum_j exp(score_j) v_j / (sum_j exp(score_j) + exp(sink_n))       the sink's term only with sinks

Rows with one query (decode) go to decode_attention.py and the others (prefill) to prefill_attention.py, or to
specialized_prefill.py where that serves: a decode row costs the same whatever stands beside it. Steps of decode rows alone have
a kernel of their own, where it serves (attend.py). float32 arithmetic, one rounding to the dtype of q at the end.

T tokens of the batch, S sequences (rows), N query heads, K kv heads, D head_dim, P = S + 1, M blocks of the longest row (table
width), B blocks in the cache, L page length (a power of two, at least 16). Sources: Kwon et al. 2023, "PagedAttention"; Dao et
al. 2022, "FlashAttention" (online softmax); Gemma 2 (soft cap); gpt-oss (sinks).
"""

import logging
from functools import cache
from typing import Any

import torch

from .attention_config import decode_config, prefill_config, specialized_prefill_config
from .cpu import ops as cpu_ops
from .decode_attention import decode_attention
from .dispatch import choose_backend, kernel_mode
from .prefill_attention import prefill_attention
from .specialized_prefill import MIN_QUERIES, specialized_prefill, unfit_reason

logger = logging.getLogger(__name__)

# Largest |out - reference| for inputs of order one: (relative, absolute).
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float16: (5e-3, 2e-3), torch.bfloat16: (2e-2, 1.6e-2)}


def paged_attention(
    q_TND: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    *,
    max_query_len: int,
    min_query_len: int = 0,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """out [T, N, D], contiguous. Block tables, query starts and context lengths are int32 on q's device.

    `max_query_len` is at least the longest row's query_len, `min_query_len` at most the shortest's: where they say that a batch
    has only decode rows, or none, the other kernel is not launched. A row without queries costs nothing. Tokens from
    query_starts[-1] on are padding: their output is not defined. q may be a strided view whose last dimension is
    contiguous. ValueError where shapes or dtypes do not fit.
    """
    check_paged_attention(
        q_TND,
        k_cache_BLKD,
        v_cache_BLKD,
        block_tables_SM,
        query_starts_P,
        context_lens_S,
        sinks_N,
        max_query_len=max_query_len,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    args = (q_TND, k_cache_BLKD, v_cache_BLKD, block_tables_SM, query_starts_P, context_lens_S)
    backend = choose_backend("paged_attention", q_TND, k_cache_BLKD)
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks_N": sinks_N}
    if backend == "triton":
        return _paged_attention_triton(*args, max_query_len=max_query_len, min_query_len=min_query_len, **options)
    run = cpu_ops.paged_attention if backend == "cpp" else paged_attention_ref
    return run(*args, max_query_len=max_query_len, **options)


def paged_attention_ref(
    q_TND: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    page_len, group = k_cache_BLKD.shape[1], q_TND.shape[1] // k_cache_BLKD.shape[2]
    out_TND = torch.zeros_like(q_TND, memory_format=torch.contiguous_format)
    starts = query_starts_P.tolist()
    for row, context_len in enumerate(context_lens_S.tolist()):
        start, end = starts[row], starts[row + 1]
        assert end - start <= min(max_query_len, context_len)
        blocks = block_tables_SM[row, : -(-context_len // page_len)].long()
        k_JND, v_JND = (
            cache[blocks].flatten(0, 1)[:context_len].float().repeat_interleave(group, dim=1)
            for cache in (k_cache_BLKD, v_cache_BLKD)
        )
        scores_NQJ = torch.einsum("qnd,jnd->nqj", q_TND[start:end].float(), k_JND) * scale
        if soft_cap is not None:
            scores_NQJ = soft_cap * torch.tanh(scores_NQJ / soft_cap)
        key_J = torch.arange(context_len, device=q_TND.device)
        query_Q1 = key_J[context_len - (end - start) :].unsqueeze(1)
        seen_QJ = key_J <= query_Q1
        if window is not None:
            seen_QJ &= key_J > query_Q1 - window
        scores_NQJ = scores_NQJ.masked_fill(~seen_QJ, float("-inf"))
        if sinks_N is not None:
            sinks_NQ1 = sinks_N.float().view(-1, 1, 1).expand(-1, end - start, 1)
            scores_NQJ = torch.cat([scores_NQJ, sinks_NQ1], dim=-1)
        weights_NQJ = scores_NQJ.softmax(-1)[..., :context_len]
        out_TND[start:end] = torch.einsum("nqj,jnd->qnd", weights_NQJ, v_JND).to(q_TND.dtype)
    return out_TND


def _paged_attention_triton(
    q_TND: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    *,
    max_query_len: int,
    min_query_len: int = 0,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows, page_len, num_kv_heads = context_lens_S.shape[0], k_cache_BLKD.shape[1], k_cache_BLKD.shape[2]
    out_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
    if out_TND.numel() == 0 or num_rows == 0:
        return out_TND
    args = (out_TND, q_TND, k_cache_BLKD, v_cache_BLKD, block_tables_SM, query_starts_P, context_lens_S)
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks_N": sinks_N}
    shape = {
        "group": q_TND.shape[1] // num_kv_heads,
        "head_dim": q_TND.shape[2],
        "element_bytes": q_TND.element_size(),
    }
    # A single row is left to one kernel. So is everything where a query's bits may not depend on how many come with it.
    may_decode = (max_query_len <= 1 or (min_query_len <= 1 and num_rows > 1)) and kernel_mode() != "invariant"
    if may_decode:
        max_keys = block_tables_SM.shape[1] * page_len
        decode = decode_config(num_rows=num_rows, num_kv_heads=num_kv_heads, max_keys=max_keys, **shape)
        decode_attention(*args, config=decode, **options)
    if max_query_len <= 1 and may_decode:
        return out_TND
    is_plain = window is None and soft_cap is None and sinks_N is None
    if is_plain and max_query_len >= MIN_QUERIES and kernel_mode() == "auto":
        config = specialized_prefill_config()
        reason = unfit_reason(q_TND, k_cache_BLKD, v_cache_BLKD, config=config)
        if reason is None:
            specialized_prefill(*args, config=config, skip_one_query=may_decode, scale=scale)
            return out_TND
        _say_once(reason)
    prefill_attention(*args, config=prefill_config(**shape), skip_one_query=may_decode, **options)
    return out_TND


@cache
def _say_once(reason: str) -> None:
    """Once a reason."""
    logger.info("prefill takes Triton's kernel instead of prefill_attention.cu: %s", reason)


def check_paged_attention(
    q_TND: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    sinks_N: torch.Tensor | None,
    *,
    max_query_len: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """ValueError where `paged_attention` takes no such arguments."""
    _check_tensors(q_TND, k_cache_BLKD, v_cache_BLKD, sinks_N)
    _check_rows(block_tables_SM, query_starts_P, context_lens_S, max_query_len, scale, window, soft_cap)


def _check_tensors(
    q_TND: torch.Tensor, k_cache_BLKD: torch.Tensor, v_cache_BLKD: torch.Tensor, sinks_N: torch.Tensor | None
) -> None:
    if k_cache_BLKD.shape != v_cache_BLKD.shape or k_cache_BLKD.dtype != v_cache_BLKD.dtype:
        raise ValueError(
            f"paged_attention: the caches differ: {tuple(k_cache_BLKD.shape)} {k_cache_BLKD.dtype} and "
            f"{tuple(v_cache_BLKD.shape)} {v_cache_BLKD.dtype}"
        )
    q_shape, cache_shape = q_TND.shape, k_cache_BLKD.shape
    if len(q_shape) != 3 or len(cache_shape) != 4 or q_shape[2] != cache_shape[3]:
        raise ValueError(
            f"paged_attention: q {tuple(q_shape)} must be [tokens, heads, head_dim] and the cache {tuple(cache_shape)} "
            "[blocks, page_len, kv_heads, head_dim]"
        )
    page_len, num_heads, num_kv_heads = cache_shape[1], q_shape[1], cache_shape[2]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"paged_attention: {num_heads} heads are not a multiple of {num_kv_heads} kv heads")
    if page_len < 16 or page_len & (page_len - 1):
        raise ValueError(f"paged_attention: page length {page_len} must be a power of two, at least 16")
    if k_cache_BLKD.stride() != v_cache_BLKD.stride():
        raise ValueError(
            f"paged_attention: the caches differ in strides: {k_cache_BLKD.stride()} and {v_cache_BLKD.stride()}; "
            "allocate both alike"
        )
    if q_TND.stride()[2] != 1 or k_cache_BLKD.stride()[3] != 1 or v_cache_BLKD.stride()[3] != 1:
        raise ValueError("paged_attention: the last dimension of q and of the caches must be contiguous")
    if sinks_N is not None and sinks_N.shape != (num_heads,):
        raise ValueError(f"paged_attention: sinks {tuple(sinks_N.shape)} must be one a query head: ({num_heads},)")


def _check_rows(
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    num_rows = context_lens_S.numel()
    if context_lens_S.dim() != 1 or query_starts_P.shape != (num_rows + 1,) or block_tables_SM.shape[:-1] != (num_rows,):
        raise ValueError(
            f"paged_attention: block tables {tuple(block_tables_SM.shape)}, query starts {tuple(query_starts_P.shape)} "
            f"and context lengths {tuple(context_lens_S.shape)} must be [S, M], [S + 1] and [S]"
        )
    if not (block_tables_SM.dtype == query_starts_P.dtype == context_lens_S.dtype == torch.int32):
        raise ValueError(
            f"paged_attention: block tables {block_tables_SM.dtype}, query starts {query_starts_P.dtype} and context "
            f"lengths {context_lens_S.dtype} must be int32"
        )
    if block_tables_SM.stride()[-1] != 1 or not (query_starts_P.is_contiguous() and context_lens_S.is_contiguous()):
        raise ValueError("paged_attention: block tables' rows, query starts and context lengths must be contiguous")
    if scale <= 0:
        raise ValueError(f"paged_attention: scale {scale} must be > 0")
    if max_query_len < 0 or (window is not None and window < 1) or (soft_cap is not None and soft_cap <= 0):
        raise ValueError(
            f"paged_attention: max_query_len {max_query_len} must be >= 0, window {window} >= 1, soft_cap {soft_cap} > 0"
        )
