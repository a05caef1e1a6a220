"""Attention of rows with one query over a paged cache, the keys of a row split over several programs (flash-decoding).

One program is one row, one kv head and one split; its M rows are the query heads of that kv head, so that each key is read
once and a tensor core's rows are used. The splits of a row have the same number of keys, a multiple of BLOCK_J and at least
`min_split_keys`: a short row uses few of them, and the others leave at once. Where a row uses several, each writes a float32
part, a normalised output and log2 of the sum of exponentials, and the last to arrive (arrivals.py) weighs the parts together
in their order: the same bits whoever that is. The sink is a key of the first split.

Terms and letters are those of paged_attention.py; s is a split, g a query head of the kv head. Source: Dao et al. 2023,
"Flash-Decoding".
"""

import torch
import triton
import triton.language as tl

from .arrivals import MAX_COUNTERS, arrival_counters
from .attention_config import DecodeConfig, padded_head_dim
from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .online_softmax import LOG2_E, attend

COMBINED_ELEMENTS = 8192  # of the parts in registers at a time


@triton.jit
def _split_keys(context_len, num_splits, min_split_keys, WINDOW: tl.constexpr, BLOCK_J: tl.constexpr):
    """(first key of split 0, keys a split). Every split that starts before context_len has a visible key."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context_len - WINDOW, 0) // BLOCK_J * BLOCK_J
    share = tl.maximum(tl.cdiv(context_len - begin, num_splits), min_split_keys)
    return begin, tl.cdiv(share, BLOCK_J) * BLOCK_J


@triton.jit
def _combine(
    partial_out,
    partial_sum,
    first_part,
    used_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_G, BLOCK_D]: the mean of the splits' outputs, weighted by their sums. Lanes past the group repeat its last."""
    g = tl.minimum(tl.arange(0, BLOCK_G), GROUP - 1)
    d = tl.arange(0, BLOCK_D)
    largest_G = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total_G = tl.zeros([BLOCK_G], tl.float32)
    out_GD = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in tl.range(0, used_splits, BLOCK_S, num_stages=1):
        s = start + tl.arange(0, BLOCK_S)
        part_SG = first_part + s[:, None] * GROUP + g[None, :]
        # Other multiprocessors wrote them: past the first-level cache, which may hold what was there before.
        sum_SG = tl.load(partial_sum + part_SG, (s < used_splits)[:, None], other=-float("inf"), cache_modifier=".cg")
        part_SGD = tl.load(
            partial_out + (part_SG * HEAD_DIM)[:, :, None] + d[None, None, :],
            (s < used_splits)[:, None, None] & (d < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_largest_G = tl.maximum(largest_G, tl.max(sum_SG, axis=0))
        weight_SG = tl.exp2(sum_SG - new_largest_G[None, :])
        rescale_G = tl.exp2(largest_G - new_largest_G)
        total_G = total_G * rescale_G + tl.sum(weight_SG, axis=0)
        out_GD = out_GD * rescale_G[:, None] + tl.sum(part_SGD * weight_SG[:, :, None], axis=0)
        largest_G = new_largest_G
    return out_GD / total_G[:, None]


@triton.jit(do_not_specialize=["num_splits", "min_split_keys", "stride_table"])
def _decode_kernel(  # noqa: PLR0915 - a kernel is one function
    q,
    k_cache,
    v_cache,
    out,
    partial_out,
    partial_sum,
    counters,
    block_tables,
    query_starts,
    context_lens,
    sinks,
    num_splits,
    min_split_keys,
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
    ONE_SPLIT: tl.constexpr,
    EARLY_START: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_LEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query_start = tl.load(query_starts + row)
    query_end = tl.load(query_starts + row + 1)
    context_len = tl.load(context_lens + row)
    begin, keys_a_split = _split_keys(context_len, num_splits, min_split_keys, WINDOW, BLOCK_J)
    first = begin + split * keys_a_split
    if (query_end - query_start != 1) | (first >= context_len):
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
    v_head = v_cache + kv_head * stride_kk
    for start in range(first, tl.minimum(first + keys_a_split, context_len), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        seen_J = j < context_len
        if WINDOW > 0:
            seen_J = seen_J & (j >= context_len - WINDOW)
        page = tl.load(table + j // PAGE_LEN, seen_J, other=0).to(tl.int64)
        needed = seen_J[:, None]
        if HEAD_DIM < BLOCK_D:
            needed = needed & (d < HEAD_DIM)[None, :]
        offset_JD = (page * stride_kb + (j % PAGE_LEN) * stride_kl)[:, None] + d[None, :]
        k_JD = tl.load(k_head + offset_JD, needed, other=0.0)
        v_JD = tl.load(v_head + offset_JD, needed, other=0.0)
        largest_M, total_M, out_MD = attend(
            q_MD, k_JD, v_JD, seen_J[None, :], scale, soft_cap, largest_M, total_M, out_MD, True, HAS_SOFT_CAP
        )

    out_MD = out_MD / total_M[:, None]
    out_row = out + (token * tl.num_programs(0) + kv_head) * GROUP * HEAD_DIM
    if first + keys_a_split >= context_len and split == 0:
        tl.store(out_row + m[:, None] * HEAD_DIM + d[None, :], out_MD.to(out.dtype.element_ty), wanted)
    elif not ONE_SPLIT:
        result = row * tl.num_programs(0) + kv_head
        first_part = result.to(tl.int64) * num_splits * GROUP
        part_M = first_part + split * GROUP + m
        tl.store(partial_out + (part_M * HEAD_DIM)[:, None] + d[None, :], out_MD, wanted)
        tl.store(partial_sum + part_M, largest_M + tl.log2(total_M), m < GROUP)
        tl.debug_barrier()  # every thread's part before the arrival
        used_splits = tl.cdiv(context_len - begin, keys_a_split)
        if tl.atomic_add(counters + result, 1, sem="acq_rel", scope="gpu") == used_splits - 1:
            tl.store(counters + result, 0)
            out_GD = _combine(partial_out, partial_sum, first_part, used_splits, GROUP, HEAD_DIM, BLOCK_S, BLOCK_G, BLOCK_D)
            g = tl.arange(0, BLOCK_G)
            in_group = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
            tl.store(out_row + g[:, None] * HEAD_DIM + d[None, :], out_GD.to(out.dtype.element_ty), in_group)


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
    partial_out = partial_sum = counters = None
    if num_splits > 1:
        assert num_rows * num_kv_heads <= MAX_COUNTERS
        counters = arrival_counters(q_TND.device)
        partial_sum = torch.empty(num_rows, num_heads, num_splits, dtype=torch.float32, device=q_TND.device)
        partial_out = torch.empty(*partial_sum.shape, head_dim, dtype=torch.float32, device=q_TND.device)
    width, block_g = padded_head_dim(head_dim), triton.next_power_of_2(group)
    _decode_kernel[(num_kv_heads, num_rows, num_splits)](
        q_TND,
        k_cache_BLKD,
        v_cache_BLKD,
        out_TND,
        partial_out,
        partial_sum,
        counters,
        block_tables_SM,
        query_starts_P,
        context_lens_S,
        sinks_N,
        num_splits,
        config.min_split_keys,
        scale,
        soft_cap if soft_cap is not None else 0.0,
        *q_TND.stride()[:2],
        *k_cache_BLKD.stride()[:3],
        block_tables_SM.stride(0),
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks_N is not None,
        ONE_SPLIT=num_splits == 1,
        WINDOW=window or 0,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_LEN=page_len,
        BLOCK_M=max(block_g, 16),
        BLOCK_J=config.block_j,
        BLOCK_D=width,
        BLOCK_S=min(max(COMBINED_ELEMENTS // (block_g * width), 1), 16),
        BLOCK_G=block_g,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(q_TND.device),
    )
