"""Draws one token a row from logits that ranks share by vocabulary, without bringing them together.

Every rank runs the race of sampling.py over its own tokens (`race_shard`), the ranks exchange three numbers a row, and each
finds the same winner (`pick_winner`): the token that `sample` draws from all logits by the same parameters, without filters.

S rows, V vocabulary of a shard, M slots, N shards.
"""

import torch
import triton
import triton.language as tl

from .cpu import ops as cpu_ops
from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import choose_backend, kernel_mode
from .drawn import ENDS, Drawn, SequenceEnds, append_tokens, ends_for_kernel
from .philox import gumbel, gumbel_ref, philox_uniform_ref, uniform_block
from .race import TileBests

FIRST_TOKEN_MULTIPLE = 4  # random numbers come in blocks of four
_CHUNK = 1024  # tokens a program: small, so that one row fills a GPU
_SCORE, _LOGIT, _TOKEN = range(3)


def race_shard(
    logits_SV: torch.Tensor,
    *,
    temperature_M: torch.Tensor,
    seeds_M: torch.Tensor,
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    first_token: int,
    bests: TileBests | None = None,
) -> torch.Tensor:
    """float32 [3, S]: the best score of each row's tokens first_token to first_token + V - 1, its logit, its token's bits.

    Of equal scores the lowest token's. A row of nothing but NaN or -inf has the score -inf and some token of the shard.
    With `bests`, which the head of a GPU makes, the logits are not read.
    Dtypes as in `sample`. ValueError where shapes or dtypes do not fit or `first_token` is no multiple of four.
    """
    _check(logits_SV, slots_S, positions_S, first_token)
    parameters = (temperature_M, seeds_M, slots_S, positions_S)
    backend = choose_backend("race_shard", logits_SV)
    if backend == "triton":
        return race_shard_triton(logits_SV, *parameters, first_token=first_token, bests=bests)
    if bests is not None:
        raise ValueError("race_shard: only the kernel of a GPU goes on with a head's bests")
    if backend == "reference":
        return race_shard_ref(logits_SV, *parameters, first_token=first_token)
    scores_S, own_S = cpu_ops.race(
        logits_SV,
        temperature_S=temperature_M[slots_S],
        seeds_S=seeds_M[slots_S],
        positions_S=positions_S,
        first_token=first_token,
    )
    return _pack(scores_S, logits_SV, own_S, first_token)


def race_shard_ref(
    logits_SV: torch.Tensor,
    temperature_M: torch.Tensor,
    seeds_M: torch.Tensor,
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    *,
    first_token: int,
) -> torch.Tensor:
    num_draws = first_token + logits_SV.shape[1]
    uniform_SV = philox_uniform_ref(seeds_M[slots_S], positions_S, num_draws)[:, first_token:]
    scores_SV = logits_SV + temperature_M[slots_S].unsqueeze(1) * gumbel_ref(uniform_SV)
    scores_SV = scores_SV.masked_fill(scores_SV.isnan(), float("-inf"))
    scores_S, own_S = scores_SV.max(-1)
    return _pack(scores_S, logits_SV, own_S, first_token)


def _pack(scores_S: torch.Tensor, logits_SV: torch.Tensor, own_S: torch.Tensor, first_token: int) -> torch.Tensor:
    logits_S = logits_SV.gather(1, own_S.unsqueeze(1)).squeeze(1)
    return torch.stack((scores_S, logits_S, (own_S + first_token).int().view(torch.float32)))


def pick_winner(entries_N3S: torch.Tensor, ends: SequenceEnds | None = None, out: Drawn | None = None) -> Drawn:
    """The draw from what `race_shard` said on each shard, in the order of shards. Appends the tokens at `ends`.

    `out`: where it is left.
    """
    if entries_N3S.dim() != 3 or entries_N3S.shape[1] != 3 or entries_N3S.dtype != torch.float32:
        raise ValueError(
            f"pick_winner: entries {tuple(entries_N3S.shape)} {entries_N3S.dtype} must be float32 [shards, 3, rows]"
        )
    if entries_N3S.device.type == "cuda" and kernel_mode() != "ref":
        return pick_winner_triton(entries_N3S.contiguous(), ends, out)
    drawn = pick_winner_ref(entries_N3S)
    if ends is not None:
        ends.append(drawn.tokens_S)
    return drawn.left_in(out)


def pick_winner_ref(entries_N3S: torch.Tensor) -> Drawn:
    shard_1S = entries_N3S[:, _SCORE].max(0, keepdim=True).indices  # the first of equals, which has the lowest token
    logits_S = entries_N3S[:, _LOGIT].gather(0, shard_1S).squeeze(0)
    tokens_S = entries_N3S[:, _TOKEN].contiguous().view(torch.int32).gather(0, shard_1S).squeeze(0)
    return Drawn.of(tokens_S.long(), logits_S)


_PARAMETERS = ["temperatures", "seeds", "slots", "positions"]


@triton.jit(do_not_specialize_on_alignment=_PARAMETERS)
def _race_kernel(
    logits,
    temperatures,
    seeds,
    slots,
    positions,
    chunk_scores,
    chunk_tokens,
    vocab,
    stride_logits,
    first_token,
    CHUNK: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    """One program a row and a chunk of the shard: the chunk's best score and the lowest of its tokens that has it."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    scores = tl.load(logits + row * stride_logits + token, token < vocab, other=-float("inf"))
    temperature = tl.load(temperatures + slot)
    if temperature > 0:
        uniform = uniform_block(tl.load(seeds + slot), tl.load(positions + row), first_token + chunk * CHUNK, CHUNK)
        scores += temperature * gumbel(uniform)
    scores = tl.where(scores > -float("inf"), scores, -float("inf"))  # NaN is not
    best = tl.max(scores, axis=0)
    out = row * tl.num_programs(1) + chunk
    tl.store(chunk_scores + out, best)
    tl.store(chunk_tokens + out, tl.min(tl.where(scores == best, token, vocab - 1), axis=0))


@triton.jit
def _best_kernel(
    best_scores,
    best_tokens,
    best_logits,
    entries,
    vocab,
    stride_logits,
    num_rows,
    num_bests,
    first_token,
    WIDTH: tl.constexpr,
    BLOCK_BESTS: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    """One program a row: the best of its chunks, or of a head's tiles. Token i's logit lies at best_logits[row, i // WIDTH]."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_BESTS)
    in_row = row * num_bests + place
    scores = tl.load(best_scores + in_row, place < num_bests, other=-float("inf"))
    tokens = tl.load(best_tokens + in_row, place < num_bests, other=vocab - 1)
    best = tl.max(scores, axis=0)
    token = tl.min(tl.where(scores == best, tokens, vocab - 1), axis=0)
    tl.store(entries + row, best)
    tl.store(entries + num_rows + row, tl.load(best_logits + row * stride_logits + token // WIDTH))
    tl.store(entries + 2 * num_rows + row, (first_token + token).to(tl.int32).to(tl.float32, bitcast=True))


def race_shard_triton(
    logits_SV: torch.Tensor,
    temperature_M: torch.Tensor,
    seeds_M: torch.Tensor,
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    *,
    first_token: int,
    bests: TileBests | None = None,
) -> torch.Tensor:
    num_rows, vocab = logits_SV.shape
    entries_3S = logits_SV.new_empty(3, num_rows)
    if num_rows == 0:
        return entries_3S
    early = launch_options(logits_SV.device)
    if bests is None:
        chunk = min(max(triton.next_power_of_2(vocab), 16), _CHUNK)
        num_bests, width = triton.cdiv(vocab, chunk), 1
        chunk_scores, chunk_tokens = logits_SV.new_empty(2, num_rows, num_bests).unbind()
        columns = (chunk_scores, chunk_tokens.view(torch.int32), logits_SV)
        _race_kernel[(num_rows, num_bests)](
            logits_SV,
            temperature_M,
            seeds_M,
            slots_S,
            positions_S,
            *columns[:2],
            vocab,
            logits_SV.stride(0),
            first_token,
            CHUNK=chunk,
            num_warps=4,
            **early,
        )
    else:
        columns, num_bests, width = (bests.scores_ST, bests.tokens_ST, bests.logits_ST), bests.scores_ST.shape[1], bests.tile
    _best_kernel[(num_rows,)](
        *columns,
        entries_3S,
        vocab,
        columns[2].stride(0),
        num_rows,
        num_bests,
        first_token,
        WIDTH=width,
        BLOCK_BESTS=triton.next_power_of_2(num_bests),
        num_warps=1 if width == 1 else 4,
        **early,
    )
    return entries_3S


@triton.jit(do_not_specialize_on_alignment=[*ENDS, "logits"])
def _pick_kernel(
    entries,
    tokens,
    logits,
    end_token_ids,
    end_slots,
    end_lengths,
    end_stride,
    num_rows,
    NUM_SHARDS: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program BLOCK rows."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    best, logit = tl.load(entries + row, inside), tl.load(entries + num_rows + row, inside)
    token = tl.load(entries + 2 * num_rows + row, inside)
    for shard in tl.static_range(1, NUM_SHARDS):
        of_shard = entries + shard * 3 * num_rows + row
        score = tl.load(of_shard, inside)
        is_better = score > best  # of equals the first shard's, which has the lowest token
        best = tl.where(is_better, score, best)
        logit = tl.where(is_better, tl.load(of_shard + num_rows, inside), logit)
        token = tl.where(is_better, tl.load(of_shard + 2 * num_rows, inside), token)
    tl.store(logits + row, logit, inside)
    token = token.to(tl.int32, bitcast=True)
    tl.store(tokens + row, token.to(tl.int64), inside)
    append_tokens(end_token_ids, end_slots, end_lengths, end_stride, row, token, inside)


def pick_winner_triton(entries_N3S: torch.Tensor, ends: SequenceEnds | None = None, out: Drawn | None = None) -> Drawn:
    num_shards, _, num_rows = entries_N3S.shape
    drawn = out or Drawn.empty(num_rows, entries_N3S.device)
    if num_rows:
        _pick_kernel[(triton.cdiv(num_rows, 128),)](
            entries_N3S,
            drawn.tokens_S,
            drawn.logits_S,
            *ends_for_kernel(ends, num_rows),
            num_rows,
            NUM_SHARDS=num_shards,
            BLOCK=128,
            **launch_options(entries_N3S.device),
        )
    return drawn


def _check(logits_SV: torch.Tensor, slots_S: torch.Tensor, positions_S: torch.Tensor, first_token: int) -> None:
    if logits_SV.dim() != 2 or logits_SV.shape[1] == 0 or logits_SV.dtype != torch.float32 or logits_SV.stride(1) != 1:
        raise ValueError(f"race_shard: logits {tuple(logits_SV.shape)} {logits_SV.dtype} must be float32 [rows, tokens]")
    if first_token % FIRST_TOKEN_MULTIPLE:
        raise ValueError(f"race_shard: the first token {first_token} must be a multiple of {FIRST_TOKEN_MULTIPLE}")
    for name, tensor_S in (("slots", slots_S), ("positions", positions_S)):
        if tensor_S.shape != logits_SV.shape[:1] or tensor_S.dtype != torch.int64 or not tensor_S.is_contiguous():
            raise ValueError(f"race_shard: {name} {tuple(tensor_S.shape)} {tensor_S.dtype} must be contiguous int64, one a row")
