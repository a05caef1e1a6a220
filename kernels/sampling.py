"""Draws one token a row from filtered logits, greedy rows and sampled rows in one call.

    kept  = tokens that top_k, top_p and min_p leave (sampling_filter)
    token = argmax over kept of  logit + temperature * g,   g = -log(-log(1 - u)),   u = philox_uniform(seed, position)[token]

g is Gumbel noise, so that the argmax is a draw from softmax(kept logits / temperature); temperature 0 is the plain argmax.
The noise belongs to (seed, position, token id) alone: the draw does not depend on the batch or on the device (but for
rounding, where two scores tie within float32), and a shard of the vocabulary can run its own part of the race
(sharded_sampling.py), or the head that makes the logits can (head_race.py).
Of equal scores the lowest id wins.

S rows, V vocabulary, M slots: the parameters lie in tables by slot. Source: Gumbel 1954; Maddison et al. 2014, "A* Sampling".
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .cpu import ops as cpu_ops
from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import choose_backend
from .drawn import ENDS, Drawn, SequenceEnds, append_tokens, ends_for_kernel
from .philox import gumbel, gumbel_ref, philox_uniform_ref, uniform_at, uniform_block
from .race import TileBests
from .sampling_filter import (
    NUM_RUNGS,
    gather_candidates,
    is_filtered,
    keep_threshold,
    keep_threshold_ref,
    lower_bound,
    summarize_chunk,
)

_CHUNK = 1024  # tokens a program of the first kernel: small, so that one row fills a GPU and top_k has many chunks
_PROGRAMS_AT_ONCE = 2048  # of the first kernel on a GPU: 16 on each of 128 multiprocessors
_CAPACITY = 32768  # candidates of a filtered row; where more are left, the whole row is searched
_TABLES = ("temperature", "top_k", "top_p", "min_p", "seeds")
_TABLE_DTYPES = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)


def sample(
    logits_SV: torch.Tensor,
    *,
    temperature_M: torch.Tensor,
    top_k_M: torch.Tensor,
    top_p_M: torch.Tensor,
    min_p_M: torch.Tensor,
    seeds_M: torch.Tensor,
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    ends: SequenceEnds | None = None,
    bests: TileBests | None = None,
    out: Drawn | None = None,
) -> Drawn:
    """Row s draws by the parameters in slots_S[s] of the tables, any of 0..M-1: not checked. Appends the tokens at `ends`.

    Logits, temperature, top_p and min_p are float32; top_k is int32; seeds, slots and positions are int64.
    Off: temperature 0 (greedy), top_k <= 0, top_p >= 1, min_p <= 0. A logit of -inf is not drawn while another
    is finite; a row of nothing but NaN or -inf draws some token of the vocabulary, and the other rows do not notice.
    With `bests`, which the head of a GPU makes, the logits of rows without a filter are not read. `out`: where it is left.
    ValueError where shapes or dtypes do not fit.
    """
    tables = (temperature_M, top_k_M, top_p_M, min_p_M, seeds_M)
    _check(logits_SV, tables, slots_S, positions_S)
    backend = choose_backend("sample", logits_SV)
    if backend == "triton":
        return draw_triton(logits_SV, tables, slots_S, positions_S, ends, bests, out)[0]
    if bests is not None:
        raise ValueError("sample: only the kernel of a GPU goes on with a head's bests")
    drawn = _draw_each(cpu_ops.sample if backend == "cpp" else _draw_ref, logits_SV, tables, slots_S, positions_S, ends)
    return drawn.left_in(out)


def sample_ref(
    logits_SV: torch.Tensor,
    *,
    temperature_M: torch.Tensor,
    top_k_M: torch.Tensor,
    top_p_M: torch.Tensor,
    min_p_M: torch.Tensor,
    seeds_M: torch.Tensor,
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    ends: SequenceEnds | None = None,
) -> Drawn:
    tables = (temperature_M, top_k_M, top_p_M, min_p_M, seeds_M)
    return _draw_each(_draw_ref, logits_SV, tables, slots_S, positions_S, ends)


def _draw_each(
    draw: Callable[..., torch.Tensor],
    logits_SV: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    ends: SequenceEnds | None,
) -> Drawn:
    """`sample` by a function that takes the parameters of each row."""
    temperature_S, top_k_S, top_p_S, min_p_S, seeds_S = (table_M.index_select(0, slots_S) for table_M in tables)
    tokens_S = draw(
        logits_SV,
        temperature_S=temperature_S,
        top_k_S=top_k_S,
        top_p_S=top_p_S,
        min_p_S=min_p_S,
        seeds_S=seeds_S,
        positions_S=positions_S,
    )
    if ends is not None:
        ends.append(tokens_S)
    return Drawn.of(tokens_S, logits_SV.gather(1, tokens_S.unsqueeze(1)).squeeze(1))


def _draw_ref(
    logits_SV: torch.Tensor,
    *,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    seeds_S: torch.Tensor,
    positions_S: torch.Tensor,
) -> torch.Tensor:
    threshold_S = keep_threshold_ref(logits_SV, temperature_S, top_k_S, top_p_S, min_p_S)
    uniform_SV = philox_uniform_ref(seeds_S, positions_S, logits_SV.shape[1])
    scores_SV = logits_SV + temperature_S.unsqueeze(1) * gumbel_ref(uniform_SV)
    return scores_SV.masked_fill(logits_SV < threshold_S.unsqueeze(1), float("-inf")).argmax(-1)


# Scalars only are read through these: a second compilation for another alignment would gain nothing.
_PARAMETERS = ["temperatures", "top_ks", "top_ps", "min_ps", "seeds", "slots", "positions"]


@triton.jit(do_not_specialize_on_alignment=_PARAMETERS)
def _summarize_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    slots,
    positions,
    chunk_scores,
    chunk_tokens,
    chunk_masses,
    ladders,
    vocab,
    stride_logits,
    num_chunks,
    FILTERED_ONLY: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    """One program a row and a chunk of the vocabulary.

    Without a filter: the chunk's best score and the lowest token that has it. With one: its largest logit, and the mass
    sum exp((logit - largest) / temperature); for top_p alone also the ladder of its masses. FILTERED_ONLY: nothing of rows
    without one; programs are fewer then, and each has every so many chunks.
    """
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    if not FILTERED_ONLY:
        scores = tl.load(logits + row * stride_logits + token, token < vocab, other=-float("inf"))
    temperature = tl.load(temperatures + slot)
    top_k, top_p = tl.load(top_ks + slot), tl.load(top_ps + slot)
    filtered = is_filtered(temperature, top_k, top_p, tl.load(min_ps + slot))
    if FILTERED_ONLY:
        for each in range(chunk, tl.where(filtered, num_chunks, 0), tl.num_programs(1)):
            token = each * CHUNK + tl.arange(0, CHUNK)
            logits_C = tl.load(logits + row * stride_logits + token, token < vocab, other=-float("inf"))
            summarize_chunk(logits_C, temperature, top_k, top_p, row * num_chunks + each, chunk_scores, chunk_masses, ladders)
    else:
        out = row * num_chunks + chunk
        if filtered:
            summarize_chunk(scores, temperature, top_k, top_p, out, chunk_scores, chunk_masses, ladders)
        else:
            if temperature > 0:
                uniform = uniform_block(tl.load(seeds + slot), tl.load(positions + row), chunk * CHUNK, CHUNK)
                scores += temperature * gumbel(uniform)
            best = tl.max(scores, axis=0)
            tl.store(chunk_scores + out, best)
            tl.store(chunk_tokens + out, tl.min(tl.where(scores == best, token, vocab - 1), axis=0))


@triton.jit
def _race(values, tokens, num_values, has_tokens, threshold, temperature, seed, position, vocab, BLOCK: tl.constexpr):
    """The winner among the values from `threshold` up, which rise in their tokens; without tokens value i is token i's."""
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    winner = tl.zeros([BLOCK], tl.int32) + (vocab - 1)
    for start in range(0, num_values, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logits = tl.load(values + token, token < num_values, other=-float("inf"))
        if has_tokens:
            token = tl.load(tokens + token, token < num_values, other=0)
        scores = logits + temperature * gumbel(uniform_at(seed, position, token))
        better = (logits >= threshold) & (scores > best)
        best, winner = tl.where(better, scores, best), tl.where(better, token, winner)
    return tl.min(tl.where(best == tl.max(best, axis=0), winner, vocab - 1), axis=0)


@triton.jit(do_not_specialize_on_alignment=[*_PARAMETERS, *ENDS, "token_logits"])
def _draw_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    slots,
    positions,
    chunk_scores,
    chunk_masses,
    ladders,
    best_scores,
    best_tokens,
    best_logits,
    candidates,
    candidate_tokens,
    tokens,
    token_logits,
    thresholds,
    end_token_ids,
    end_slots,
    end_lengths,
    end_stride,
    vocab,
    stride_logits,
    num_chunks,
    num_bests,
    stride_best_logits,
    BEST_WIDTH: tl.constexpr,
    BLOCK_BESTS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RACE: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    """One program a row. Without a filter only the best of the row's bests is left to find: of chunks, or of a head's tiles.

    The logit of token i lies at best_logits[row, i // BEST_WIDTH].
    """
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    program = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + program)
    temperature = tl.load(temperatures + slot)
    top_k, top_p, min_p = tl.load(top_ks + slot), tl.load(top_ps + slot), tl.load(min_ps + slot)
    threshold = tl.full([], -float("inf"), tl.float32)
    if is_filtered(temperature, top_k, top_p, min_p):
        row = logits + program * stride_logits
        chunk = tl.arange(0, BLOCK_CHUNKS)
        in_row = program * num_chunks + chunk
        scores = tl.load(chunk_scores + in_row, chunk < num_chunks, other=-float("inf"))
        largest = tl.max(scores, axis=0)
        masses = tl.load(chunk_masses + in_row, chunk < num_chunks, other=0.0)
        total = tl.sum(masses * tl.exp((scores - largest) / temperature), axis=0)
        bound = lower_bound(
            chunk_scores + program * num_chunks,
            ladders + program * num_chunks * NUM_RUNGS,
            num_chunks,
            vocab,
            largest,
            total,
            temperature,
            top_k,
            top_p,
            min_p,
            BLOCK_CHUNKS,
        )
        values, value_tokens = candidates + program * CAPACITY, candidate_tokens + program * CAPACITY
        num_values = gather_candidates(row, vocab, bound, values, value_tokens, CAPACITY, BLOCK)
        all_fit = num_values <= CAPACITY
        if not all_fit:
            values, num_values = row, vocab
        threshold = keep_threshold(values, num_values, bound, largest, total, temperature, top_k, top_p, min_p, BLOCK)
        seed, position = tl.load(seeds + slot), tl.load(positions + program)
        winner = _race(values, value_tokens, num_values, all_fit, threshold, temperature, seed, position, vocab, BLOCK_RACE)
        logit = tl.load(row + winner)
    else:
        place = tl.arange(0, BLOCK_BESTS)
        bests = tl.load(best_scores + program * num_bests + place, place < num_bests, other=-float("inf"))
        winners = tl.load(best_tokens + program * num_bests + place, place < num_bests, other=vocab - 1)
        winner = tl.min(tl.where(bests == tl.max(bests, axis=0), winners, vocab - 1), axis=0)
        logit = tl.load(best_logits + program * stride_best_logits + winner // BEST_WIDTH)
    tl.store(tokens + program, winner.to(tl.int64))
    append_tokens(end_token_ids, end_slots, end_lengths, end_stride, program, winner, True)
    tl.store(token_logits + program, logit)
    tl.store(thresholds + program, threshold)


def draw_triton(
    logits_SV: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    ends: SequenceEnds | None = None,
    bests: TileBests | None = None,
    out: Drawn | None = None,
) -> tuple[Drawn, torch.Tensor]:
    """(what is drawn, threshold_S), in two launches; the device alone knows which rows have filters.

    `tables` are temperature_M, top_k_M, top_p_M, min_p_M and seeds_M.
    """
    num_rows, vocab = logits_SV.shape
    drawn, threshold_S = out or Drawn.empty(num_rows, logits_SV.device), logits_SV.new_empty(num_rows)
    if num_rows == 0:
        return drawn, threshold_S
    chunk = min(max(triton.next_power_of_2(vocab), 16), _CHUNK)
    num_chunks = triton.cdiv(vocab, 4 * chunk) * 4  # a multiple of four keeps every part of the scratch aligned
    capacity = min(triton.next_power_of_2(vocab), _CAPACITY)
    # All 4-byte scratch in one allocation: logits, masses, tokens and ladders of chunks; values and tokens of candidates.
    sizes = [num_rows * num_chunks * width for width in (1, 1, 1, NUM_RUNGS.value)] + [num_rows * capacity] * 2
    scratch = logits_SV.new_empty(sum(sizes))
    chunk_scores, chunk_masses, chunk_tokens, ladders, candidates, candidate_tokens = scratch.split(sizes)
    chunk_tokens = chunk_tokens.view(torch.int32)
    parameters = (*tables, slots_S, positions_S)
    early = launch_options(logits_SV.device)
    # With bests most rows may have nothing to do, and programs that only find that out cost time.
    num_programs = num_chunks if bests is None else min(num_chunks, triton.cdiv(_PROGRAMS_AT_ONCE, num_rows))
    _summarize_kernel[(num_rows, num_programs)](
        logits_SV,
        *parameters,
        chunk_scores,
        chunk_tokens,
        chunk_masses,
        ladders,
        vocab,
        logits_SV.stride(0),
        num_chunks,
        FILTERED_ONLY=bests is not None,
        CHUNK=chunk,
        num_warps=4,
        **early,
    )
    if bests is None:
        best_columns, num_bests, best_width = (chunk_scores, chunk_tokens, logits_SV), num_chunks, 1
    else:
        best_columns = (bests.scores_ST, bests.tokens_ST, bests.logits_ST)
        num_bests, best_width = bests.scores_ST.shape[1], bests.tile
    _draw_kernel[(num_rows,)](
        logits_SV,
        *parameters,
        chunk_scores,
        chunk_masses,
        ladders,
        *best_columns,
        candidates,
        candidate_tokens.view(torch.int32),
        drawn.tokens_S,
        drawn.logits_S,
        threshold_S,
        *ends_for_kernel(ends, num_rows),
        vocab,
        logits_SV.stride(0),
        num_chunks,
        num_bests,
        best_columns[2].stride(0),
        BEST_WIDTH=best_width,
        BLOCK_BESTS=triton.next_power_of_2(num_bests),
        BLOCK_CHUNKS=triton.next_power_of_2(num_chunks),
        CAPACITY=capacity,
        BLOCK=min(triton.next_power_of_2(vocab), 8192),
        BLOCK_RACE=min(triton.next_power_of_2(vocab), 4096),  # random numbers take many registers
        num_warps=16,
        **early,
    )
    return drawn, threshold_S


def _check(logits_SV: torch.Tensor, tables: tuple[torch.Tensor, ...], slots_S: torch.Tensor, positions_S: torch.Tensor) -> None:
    if logits_SV.dim() != 2 or logits_SV.shape[1] == 0 or logits_SV.dtype != torch.float32 or logits_SV.stride(1) != 1:
        raise ValueError(f"sample: logits {tuple(logits_SV.shape)} {logits_SV.dtype} must be float32 [rows, vocabulary]")
    for name, table_M, dtype in zip(_TABLES, tables, _TABLE_DTYPES, strict=True):
        if table_M.dim() != 1 or len(table_M) != len(tables[0]) or table_M.dtype != dtype or not table_M.is_contiguous():
            raise ValueError(
                f"sample: {name} {tuple(table_M.shape)} {table_M.dtype} must be contiguous {dtype}, one number for each of "
                f"{len(tables[0])} slots"
            )
    for name, tensor_S in (("slots", slots_S), ("positions", positions_S)):
        if tensor_S.shape != logits_SV.shape[:1] or tensor_S.dtype != torch.int64 or not tensor_S.is_contiguous():
            raise ValueError(
                f"sample: {name} {tuple(tensor_S.shape)} {tensor_S.dtype} must be contiguous int64, one for each row of "
                f"logits {tuple(logits_SV.shape)}"
            )
