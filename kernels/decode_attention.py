"""Attention of rows with one query over a paged cache, the keys of a row split over several programs (flash-decoding).

One program is one row, one kv head and one split; its M rows are the query heads of that kv head, so that each key is read
once and a tensor core's rows are used. A split has the same number of keys, a multiple of BLOCK_J, whatever the row; splits
behind a short row's last key leave at once and write nothing, for the combining kernel counts them out by the same rule.
Partial results are float32: a normalised output, and log2 of the sum of exponentials. The sink is a key of the first split.

Terms and letters are those of paged_attention.py; s is a split. Source: Dao et al. 2023, "Flash-Decoding".
"""

import torch
import triton
import triton.language as tl

from .attention_config import DecodeConfig, padded_head_dim
from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .online_softmax import LOG2_E, attend


@triton.jit
def _split_keys(context_len, num_splits, WINDOW: tl.constexpr, BLOCK_J: tl.constexpr):
    """(first key of split 0, keys a split). Every split that starts before context_len has a visible key."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context_len - WINDOW, 0) // BLOCK_J * BLOCK_J
    return begin, tl.cdiv(tl.cdiv(context_len - begin, num_splits), BLOCK_J) * BLOCK_J


@triton.jit(do_not_specialize=["num_splits", "stride_table"])
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    out,
    partial_out,
    partial_sum,
    block_tables,
    query_starts,
    context_lens,
    sinks,
    num_splits,
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
    ONE_SPLIT: tl.constexpr,
    EARLY_START: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_LEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    let_next_start(EARLY_START)
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query_start = tl.load(query_starts + row)
    query_end = tl.load(query_starts + row + 1)
    context_len = tl.load(context_lens + row)
    begin, keys_a_split = _split_keys(context_len, num_splits, WINDOW, BLOCK_J)
    first = begin + split * keys_a_split
    is_mine = (query_end - query_start == 1) & (first < context_len)
    wait_for_previous(EARLY_START)
    if not is_mine:
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + m
    wanted = (m < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    token = query_start.to(tl.int64)
    q_MD = tl.load(q + token * stride_qt + (head * stride_qn)[:, None] + d[None, :], wanted, other=0.0)

    largest_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:  # a sink is a key whose value is zero
        sink_M = tl.load(sinks + head, m < GROUP, other=0.0).to(tl.float32) * LOG2_E
        largest_M = tl.where(split == 0, sink_M, largest_M)
        total_M += tl.where(split == 0, 1.0, 0.0)
    out_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    table = block_tables + row.to(tl.int64) * stride_table
    k_head = k_cache + kv_head * stride_kk
    v_head = v_cache + kv_head * stride_vk
    for start in range(first, tl.minimum(first + keys_a_split, context_len), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        seen_J = j < context_len
        if WINDOW > 0:
            seen_J = seen_J & (j >= context_len - WINDOW)
        page = tl.load(table + j // PAGE_LEN, seen_J, other=0).to(tl.int64)
        needed = seen_J[:, None]
        if HEAD_DIM < BLOCK_D:
            needed = needed & (d < HEAD_DIM)[None, :]
        k_JD = tl.load(k_head + (page * stride_kb + (j % PAGE_LEN) * stride_kl)[:, None] + d[None, :], needed, other=0.0)
        v_JD = tl.load(v_head + (page * stride_vb + (j % PAGE_LEN) * stride_vl)[:, None] + d[None, :], needed, other=0.0)
        largest_M, total_M, out_MD = attend(
            q_MD, k_JD, v_JD, seen_J[None, :], scale, soft_cap, largest_M, total_M, out_MD, HAS_SOFT_CAP
        )

    out_MD = out_MD / total_M[:, None]
    num_heads = tl.num_programs(0) * GROUP
    if ONE_SPLIT:
        out_M = out + (token * num_heads + head) * HEAD_DIM
        tl.store(out_M[:, None] + d[None, :], out_MD.to(out.dtype.element_ty), wanted)
    else:
        part_M = (row.to(tl.int64) * num_heads + head) * num_splits + split
        tl.store(partial_out + (part_M * HEAD_DIM)[:, None] + d[None, :], out_MD, wanted)
        tl.store(partial_sum + part_M, largest_M + tl.log2(total_M), m < GROUP)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    partial_out,
    partial_sum,
    out,
    query_starts,
    context_lens,
    num_splits,
    WINDOW: tl.constexpr,
    EARLY_START: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a row and a query head: the mean of the splits' outputs, weighted by their sums."""
    let_next_start(EARLY_START)
    head, row = tl.program_id(0), tl.program_id(1)
    query_start = tl.load(query_starts + row)
    query_end = tl.load(query_starts + row + 1)
    context_len = tl.load(context_lens + row)
    wait_for_previous(EARLY_START)
    if query_end - query_start != 1:
        return
    begin, keys_a_split = _split_keys(context_len, num_splits, WINDOW, BLOCK_J)
    used_splits = tl.cdiv(context_len - begin, keys_a_split)

    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    first_part = (row.to(tl.int64) * tl.num_programs(0) + head) * num_splits
    largest, total = -float("inf"), 0.0
    out_D = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, used_splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        sum_S = tl.load(partial_sum + first_part + s, s < used_splits, other=-float("inf"))
        part_SD = tl.load(
            partial_out + ((first_part + s) * HEAD_DIM)[:, None] + d[None, :],
            (s < used_splits)[:, None] & in_head[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(sum_S, axis=0))
        weight_S = tl.exp2(sum_S - new_largest)
        rescale = tl.exp2(largest - new_largest)
        total = total * rescale + tl.sum(weight_S, axis=0)
        out_D = out_D * rescale + tl.sum(part_SD * weight_S[:, None], axis=0)
        largest = new_largest
    out_row = (query_start.to(tl.int64) * tl.num_programs(0) + head) * HEAD_DIM
    tl.store(out + out_row + d, (out_D / total).to(out.dtype.element_ty), in_head)


def decode_attention(
    out_TND: torch.Tensor,
    q_TND: torch.Tensor,
    k_cache_BLKD: torch.Tensor,
    v_cache_BLKD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    query_starts_P: torch.Tensor,
    context_lens_S: torch.Tensor,
    *,
    config: DecodeConfig,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks_N: torch.Tensor | None,
) -> None:
    """Writes the tokens of rows with exactly one query into `out_TND`, contiguous; other rows are left alone."""
    _, num_heads, head_dim = q_TND.shape
    num_rows, page_len, num_kv_heads = context_lens_S.shape[0], k_cache_BLKD.shape[1], k_cache_BLKD.shape[2]
    group, num_splits = num_heads // num_kv_heads, config.num_splits
    partial_out = partial_sum = None
    if num_splits > 1:
        partial_sum = torch.empty(num_rows, num_heads, num_splits, dtype=torch.float32, device=q_TND.device)
        partial_out = torch.empty(*partial_sum.shape, head_dim, dtype=torch.float32, device=q_TND.device)
    shared = {
        "WINDOW": window or 0,
        "HEAD_DIM": head_dim,
        "BLOCK_J": config.block_j,
        "BLOCK_D": padded_head_dim(head_dim),
        **launch_options(q_TND.device),
    }
    _decode_kernel[(num_kv_heads, num_rows, num_splits)](
        q_TND,
        k_cache_BLKD,
        v_cache_BLKD,
        out_TND,
        partial_out,
        partial_sum,
        block_tables_SM,
        query_starts_P,
        context_lens_S,
        sinks_N,
        num_splits,
        scale,
        soft_cap if soft_cap is not None else 0.0,
        *q_TND.stride()[:2],
        *k_cache_BLKD.stride()[:3],
        *v_cache_BLKD.stride()[:3],
        block_tables_SM.stride(0),
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks_N is not None,
        ONE_SPLIT=num_splits == 1,
        GROUP=group,
        PAGE_LEN=page_len,
        BLOCK_M=max(triton.next_power_of_2(group), 16),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared,
    )
    if num_splits > 1:
        tail = (partial_out, partial_sum, out_TND, query_starts_P, context_lens_S, num_splits)
        block_s = min(triton.next_power_of_2(num_splits), 32)
        _combine_kernel[(num_heads, num_rows)](*tail, BLOCK_S=block_s, num_warps=4, **shared)
