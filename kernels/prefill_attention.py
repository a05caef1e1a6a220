"""Attention of rows with several queries over a paged cache, read page by page.

One program is a tile of BLOCK_Q queries of one row and one kv head: its M rows are those queries times the query heads of the
kv head, so that a tensor core's rows are full. Keys before the window of the first query or behind the last query's own are
never touched; scores are masked only in the blocks that some query sees in part. One loop goes over all blocks, because every
loop fills its pipeline anew; the page ids of a block are read one step before the loads of its keys are issued.

A multiprocessor is kept busy in one of two ways (PrefillConfig.products_overlap). One program may have all its registers:
then the product with the values of a block runs on while that of the next block's scores starts. Or two programs share it
and each does the other's waiting: then their products end in their own step, which is what fits in 128 registers a thread.

Terms and letters are those of paged_attention.py. Source: Dao 2023, "FlashAttention-2".
"""

import torch
import triton
import triton.language as tl

from .attention_config import PrefillConfig, padded_head_dim
from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .online_softmax import LOG2_E, add_keys, score_keys


@triton.jit
def _find_row(query_starts, num_rows, tile, BLOCK_Q: tl.constexpr):
    """The row of a tile of BLOCK_Q queries: the last whose first tile, query_start // BLOCK_Q + row, is not beyond it.

    A row gets at least the tiles that it needs, and all rows together at most T // BLOCK_Q + S.
    """
    num_not_beyond = 0
    for start in range(0, num_rows, 256):
        row = start + tl.arange(0, 256)
        first_tile = tl.load(query_starts + row, row < num_rows, other=0) // BLOCK_Q + row
        num_not_beyond += tl.sum(((first_tile <= tile) & (row < num_rows)).to(tl.int32), axis=0)
    return num_not_beyond - 1


@triton.jit
def _key_ranges(first_position, context_len, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr):
    """(first_needed, full_begin, full_end, end) of a tile's keys.

    Blocks before full_begin lose some keys to the window, those up to full_end are seen by every query, the last by some.
    """
    end = tl.minimum(first_position + BLOCK_Q, context_len)
    first_needed = 0
    full_begin = 0
    if WINDOW > 0:
        first_needed = tl.maximum(first_position - WINDOW + 1, 0)
        full_begin = tl.cdiv(tl.maximum(first_position + BLOCK_Q - WINDOW, 0), BLOCK_J) * BLOCK_J
    full_end = tl.maximum(full_begin, (first_position + 1) // BLOCK_J * BLOCK_J)
    return first_needed, full_begin, full_end, end


@triton.jit
def _needed_keys(start, j, first_needed, end, WINDOW: tl.constexpr):
    """Which of the keys start + j some query of the tile sees."""
    needed_J = j < end - start
    if WINDOW > 0:
        needed_J = needed_J & (j >= first_needed - start)
    return needed_J


@triton.jit
def _load_page_ids(table, start, j, needed_J, PAGE_LEN: tl.constexpr):
    """The page of each key start + j that is needed; no other entry of the table is read.

    start is a multiple of the number of keys in j, and that number and PAGE_LEN are powers of two: keys and pages nest.
    """
    return tl.load(table + start // PAGE_LEN + j // PAGE_LEN, needed_J, other=0)


@triton.jit(do_not_specialize=["num_rows", "stride_table"])
def _prefill_kernel(  # noqa: PLR0915 - a kernel is one function
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
    stride_table,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    MIN_QUERIES: tl.constexpr,
    PRODUCTS_OVERLAP: tl.constexpr,
    EARLY_START: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_LEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    # The last tiles of a row have the most keys: they start first, so that short ones fill the end.
    kv_head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    row = _find_row(query_starts, num_rows, tile, BLOCK_Q)
    query_start = tl.load(query_starts + row)
    query_len = tl.load(query_starts + row + 1) - query_start
    context_len = tl.load(context_lens + row)
    first_query = (tile - query_start // BLOCK_Q - row) * BLOCK_Q
    if (first_query >= query_len) | (query_len < MIN_QUERIES):
        return
    first_position = context_len - query_len + first_query

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query, head = first_query + m // GROUP, kv_head * GROUP + m % GROUP
    position_M = first_position + m // GROUP
    token = (query_start + query).to(tl.int64)
    valid = (m < BLOCK_Q * GROUP) & (query < query_len)
    wanted = valid[:, None] & (d < HEAD_DIM)[None, :]
    q_MD = tl.load(q + (token * stride_qt + head * stride_qn)[:, None] + d[None, :], wanted, other=0.0)

    largest_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:  # a sink is a key whose value is zero
        largest_M = tl.load(sinks + head, valid, other=0.0).to(tl.float32) * LOG2_E
        total_M = tl.full([BLOCK_M], 1.0, tl.float32)
    out_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    first_needed, full_begin, full_end, end = _key_ranges(first_position, context_len, WINDOW, BLOCK_Q, BLOCK_J)
    table = block_tables + row.to(tl.int64) * stride_table
    k_head = k_cache + kv_head * stride_kk
    v_head = v_cache + kv_head * stride_kk
    j = tl.arange(0, BLOCK_J)
    in_page_JD = ((j % PAGE_LEN) * stride_kl)[:, None] + d[None, :]
    first = first_needed // BLOCK_J * BLOCK_J
    page_J = _load_page_ids(table, first, j, _needed_keys(first, j, first_needed, end, WINDOW), PAGE_LEN)
    for start in range(first, end, BLOCK_J):
        offset_JD = (page_J.to(tl.int64) * stride_kb)[:, None] + in_page_JD
        if PAGE_LEN > BLOCK_J:
            offset_JD += start % PAGE_LEN * stride_kl
        in_cache = _needed_keys(start, j, first_needed, end, WINDOW)[:, None]
        if HEAD_DIM < BLOCK_D:
            in_cache = in_cache & (d < HEAD_DIM)[None, :]
        k_JD = tl.load(k_head + offset_JD, in_cache, other=0.0)
        v_JD = tl.load(v_head + offset_JD, in_cache, other=0.0)
        next_needed_J = _needed_keys(start + BLOCK_J, j, first_needed, end, WINDOW)
        page_J = _load_page_ids(table, start + BLOCK_J, j, next_needed_J, PAGE_LEN)
        if not PRODUCTS_OVERLAP and start == first:
            out_MD = out_MD * 0.0  # changes nothing, but `out` is used before the first product: the second has ended then
        score_MJ, unit = score_keys(q_MD, k_JD, scale, soft_cap, HAS_SOFT_CAP)
        if (start < full_begin) | (start >= full_end):
            seen_MJ = j[None, :] <= (position_M - start)[:, None]
            if WINDOW > 0:
                seen_MJ = seen_MJ & (j[None, :] > (position_M - (start + WINDOW))[:, None])
            score_MJ = tl.where(seen_MJ, score_MJ, -float("inf"))
        largest_M, total_M, out_MD = add_keys(score_MJ, unit, v_JD.to(q_MD.dtype), largest_M, total_M, out_MD, WINDOW > 0)

    out_MD = out_MD / tl.where(valid, total_M, 1.0)[:, None]
    out_row = (token * (tl.num_programs(0) * GROUP) + head) * HEAD_DIM
    tl.store(out + out_row[:, None] + d[None, :], out_MD.to(out.dtype.element_ty), wanted)


def prefill_attention(
    out_TND: torch.Tensor,
    q_TND: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    *,
    config: PrefillConfig,
    skip_one_query: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks_N: torch.Tensor | None,
) -> None:
    """Writes the tokens of all rows into `out_TND`, contiguous; with `skip_one_query` only those of rows with several."""
    num_tokens, num_heads, head_dim = q_TND.shape
    num_rows, page_len, num_kv_heads = context_lens_S.shape[0], k_cache_BLKD.shape[1], k_cache_BLKD.shape[2]
    group = num_heads // num_kv_heads
    block_q = config.block_m // group
    limits = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    _prefill_kernel[(num_kv_heads, num_tokens // block_q + num_rows)](
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
        block_tables_SM.stride(0),
        WINDOW=window or 0,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks_N is not None,
        MIN_QUERIES=2 if skip_one_query else 1,
        PRODUCTS_OVERLAP=config.products_overlap,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_LEN=page_len,
        BLOCK_Q=block_q,
        BLOCK_M=config.block_m,
        BLOCK_J=config.block_j,
        BLOCK_D=padded_head_dim(head_dim),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **limits,
        **launch_options(q_TND.device),
    )
