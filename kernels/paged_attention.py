"""Causal attention over a paged KV cache: prefill and decode rows of different lengths in one call.

Row s has query_len = query_starts[s + 1] - query_starts[s] queries, and context_lens[s] keys, the row's new tokens
included (they are stored already). Its query i sits at position p = context_len - query_len + i and sees the keys at
positions (p - window, p]; key j lies at block block_tables[s, j // L], offset j % L. Query head n reads kv head
n // (N / K).

    score = scale * q . k ;   with a soft cap c:   score = c * tanh(score / c)
    out   = sum_j exp(score_j) v_j / (sum_j exp(score_j) + exp(sink_n))       the sink's term only with sinks

float32 arithmetic, one rounding to the dtype of q at the end. T tokens of the batch, S sequences (rows), N query heads, K kv
heads, D head_dim, P = S + 1, M blocks of the longest row (table width), B blocks in the cache, L page length (a power of
two, at least 16). Sources: Kwon et al. 2023, "PagedAttention"; Dao et al. 2022, "FlashAttention" (online softmax);
Gemma 2 (soft cap); gpt-oss (sinks).
"""

import torch
import triton
import triton.language as tl

from .cpu import ops as cpu_ops
from .dispatch import choose_backend

LOG2_E = tl.constexpr(1.4426950408889634)

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
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """out [T, N, D], contiguous. Block tables, query starts and context lengths are int32 on q's device.

    `max_query_len` is at least the longest row's query_len. A row without queries costs nothing. Tokens from
    query_starts[-1] on are padding: their output is not defined. q may be a strided view whose last dimension is
    contiguous. ValueError where shapes or dtypes do not fit.
    """
    _check_tensors(q_TND, k_cache_BLKD, v_cache_BLKD, sinks_N)
    _check_rows(block_tables_SM, query_starts_P, context_lens_S, max_query_len, window, soft_cap)
    args = (q_TND, k_cache_BLKD, v_cache_BLKD, block_tables_SM, query_starts_P, context_lens_S)
    backend = choose_backend("paged_attention", q_TND, k_cache_BLKD)
    run = paged_attention_ref
    if backend != "reference":
        run = cpu_ops.paged_attention if backend == "cpp" else _paged_attention_triton
    return run(*args, max_query_len=max_query_len, scale=scale, window=window, soft_cap=soft_cap, sinks_N=sinks_N)


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


@triton.jit
def _find_row(query_starts, num_rows, tile, BLOCK_Q: tl.constexpr):
    """The row of a tile of BLOCK_Q queries: the last whose first tile, query_start // BLOCK_Q + row, is not beyond it.

    A row gets at least the tiles that it needs, and all rows together at most T // BLOCK_Q + S.
    """
    low, high = 0, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend(q_MD, k_DJ, v_JD, seen_MJ, scale, soft_cap, largest_M, total_M, out_MD, HAS_SOFT_CAP: tl.constexpr):
    """One step of the online softmax. Scores are in units of log2, so that exp2 serves."""
    score_MJ = tl.dot(q_MD, k_DJ.to(q_MD.dtype), input_precision="ieee") * scale
    if HAS_SOFT_CAP:
        score_MJ = soft_cap * (2.0 * tl.sigmoid(2.0 * score_MJ / soft_cap) - 1.0)
    score_MJ = tl.where(seen_MJ, score_MJ * LOG2_E, -float("inf"))
    new_largest_M = tl.maximum(largest_M, tl.max(score_MJ, axis=1))
    # A query that has seen no key yet keeps a finite offset: -inf minus -inf is not a number.
    offset_M = tl.where(new_largest_M == -float("inf"), 0.0, new_largest_M)
    weight_MJ = tl.exp2(score_MJ - offset_M[:, None])
    rescale_M = tl.exp2(largest_M - offset_M)
    total_M = total_M * rescale_M + tl.sum(weight_MJ, axis=1)
    added_MD = tl.dot(weight_MJ.to(q_MD.dtype), v_JD.to(q_MD.dtype), input_precision="ieee")
    return new_largest_M, total_M, out_MD * rescale_M[:, None] + added_MD


@triton.jit
def _paged_attention_kernel(
    q,
    k_cache,
    v_cache,
    out,
    block_tables,
    query_starts,
    context_lens,
    sinks,
    num_rows,
    scale,
    soft_cap,
    stride_qt,
    stride_qn,
    stride_kb,
    stride_kl,
    stride_kk,
    stride_vb,
    stride_vl,
    stride_vk,
    stride_table,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_LEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a tile of BLOCK_Q queries of one row and one kv head.

    M holds the GROUP query heads of BLOCK_Q queries, so that decode fills a tensor core's rows too; J walks over keys, from
    the first in the window of the first query to the last query's own.
    """
    kv_head = tl.program_id(1)
    row, first_query = tl.program_id(0), 0
    if not ONE_QUERY:
        row = _find_row(query_starts, num_rows, tl.program_id(0), BLOCK_Q)
        first_query = (tl.program_id(0) - tl.load(query_starts + row) // BLOCK_Q - row) * BLOCK_Q
    query_start = tl.load(query_starts + row)
    query_len = tl.load(query_starts + row + 1) - query_start
    if first_query >= query_len:
        return
    context_len = tl.load(context_lens + row)
    first_position = context_len - query_len + first_query

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query, head = first_query + m // GROUP, kv_head * GROUP + m % GROUP
    position = first_position + m // GROUP
    token = (query_start + query).to(tl.int64)
    valid = (m < BLOCK_Q * GROUP) & (query < query_len)
    in_head = d < HEAD_DIM
    wanted = valid[:, None] & in_head[None, :]
    q_MD = tl.load(q + (token * stride_qt + head * stride_qn)[:, None] + d[None, :], wanted, other=0.0)

    largest_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:  # a sink is a key whose value is zero
        largest_M = tl.load(sinks + head, valid, other=0.0).to(tl.float32) * LOG2_E
        total_M = tl.full([BLOCK_M], 1.0, tl.float32)
    out_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    end = tl.minimum(first_position + BLOCK_Q, context_len)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0)
    for start in range(begin // BLOCK_J * BLOCK_J, end, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        needed = (j >= begin) & (j < end)  # no page outside of it is touched
        page = tl.load(block_tables + row * stride_table + j // PAGE_LEN, needed, other=0).to(tl.int64)
        k_row = k_cache + page * stride_kb + (j % PAGE_LEN) * stride_kl + kv_head * stride_kk
        v_row = v_cache + page * stride_vb + (j % PAGE_LEN) * stride_vl + kv_head * stride_vk
        k_DJ = tl.load(k_row[None, :] + d[:, None], needed[None, :] & in_head[:, None], other=0.0)
        v_JD = tl.load(v_row[:, None] + d[None, :], needed[:, None] & in_head[None, :], other=0.0)
        seen_MJ = needed[None, :] & (j[None, :] <= position[:, None])
        if WINDOW > 0:
            seen_MJ = seen_MJ & (j[None, :] > position[:, None] - WINDOW)
        largest_M, total_M, out_MD = _attend(
            q_MD, k_DJ, v_JD, seen_MJ, scale, soft_cap, largest_M, total_M, out_MD, HAS_SOFT_CAP
        )

    out_MD = out_MD / tl.where(valid, total_M, 1.0)[:, None]
    out_row = (token * (tl.num_programs(1) * GROUP) + head) * HEAD_DIM
    tl.store(out + out_row[:, None] + d[None, :], out_MD.to(out.dtype.element_ty), wanted)


def _paged_attention_triton(
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
    num_tokens, num_heads, head_dim = q_TND.shape
    num_rows, page_len, num_kv_heads = context_lens_S.shape[0], k_cache_BLKD.shape[1], k_cache_BLKD.shape[2]
    group = num_heads // num_kv_heads
    out_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
    if out_TND.numel() == 0 or num_rows == 0:
        return out_TND
    one_query = max_query_len <= 1
    tiles = _tile_sizes(group, head_dim, q_TND.element_size(), one_query=one_query)
    num_tiles = num_rows if one_query else num_tokens // tiles["BLOCK_Q"] + num_rows
    _paged_attention_kernel[(num_tiles, num_kv_heads)](
        q_TND,
        k_cache_BLKD,
        v_cache_BLKD,
        out_TND,
        block_tables_SM,
        query_starts_P,
        context_lens_S,
        sinks_N,
        num_rows,
        scale,
        soft_cap if soft_cap is not None else 0.0,
        *q_TND.stride()[:2],
        *k_cache_BLKD.stride()[:3],
        *v_cache_BLKD.stride()[:3],
        block_tables_SM.stride(0),
        WINDOW=window or 0,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks_N is not None,
        ONE_QUERY=one_query,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_LEN=page_len,
        num_warps=8 if tiles["BLOCK_M"] >= 128 else 4,
        num_stages=2,
        **tiles,
    )
    return out_TND


def _tile_sizes(group: int, head_dim: int, element_bytes: int, *, one_query: bool) -> dict[str, int]:
    """Rows of queries that fill a tensor core; a tile of keys of about 16 KiB, so that two stages fit in shared memory."""
    block_d = max(triton.next_power_of_2(head_dim), 16)
    row_bytes = block_d * element_bytes
    wanted_rows = 16 if one_query or row_bytes > 2048 else 128 if row_bytes <= 256 else 32
    block_m = max(triton.next_power_of_2(group), wanted_rows)
    block_j = min(max(16 * 1024 // row_bytes, 16), 128)
    return {"BLOCK_Q": block_m // group, "BLOCK_M": block_m, "BLOCK_J": block_j, "BLOCK_D": block_d}


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
    if q_TND.stride()[2] != 1 or k_cache_BLKD.stride()[3] != 1 or v_cache_BLKD.stride()[3] != 1:
        raise ValueError("paged_attention: the last dimension of q and of the caches must be contiguous")
    if sinks_N is not None and sinks_N.shape != (num_heads,):
        raise ValueError(f"paged_attention: sinks {tuple(sinks_N.shape)} must be one a query head: ({num_heads},)")


def _check_rows(
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    max_query_len: int,
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
    if max_query_len < 0 or (window is not None and window < 1) or (soft_cap is not None and soft_cap <= 0):
        raise ValueError(
            f"paged_attention: max_query_len {max_query_len} must be >= 0, window {window} >= 1, soft_cap {soft_cap} > 0"
        )
