"""A head's part in the draw: which numbers its race wants, and what it leaves behind (head_race.py, sampling.py).

S rows, M slots, V vocabulary of this rank, T tiles of it. `race_tile` is the end of a Triton kernel; cuda/race.cuh is its twin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .philox import gumbel, uniform_columns


@dataclass(frozen=True, slots=True)
class RaceRows:
    """Tables by slot, and each row's slot, position and wish; dtypes and shapes as in `sample`.

    Attributes:
        wants_logits_S: int64, not 0 where the row's logits are read, so that it takes no part in the race; None: nowhere.
    """

    temperature_M: torch.Tensor
    seeds_M: torch.Tensor
    slots_S: torch.Tensor
    positions_S: torch.Tensor
    wants_logits_S: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TileBests:
    """Of each `tile` tokens of a row the best score, the lowest token that has it (of the shard, int32), and its logit.

    Not defined in rows whose logits are wanted.
    """

    scores_ST: torch.Tensor
    tokens_ST: torch.Tensor
    logits_ST: torch.Tensor
    tile: int


@dataclass(frozen=True, slots=True)
class HeadScores:
    """float32 logits [S, V]; beside `bests` those rows alone are filled whose logits are wanted."""

    logits_SV: torch.Tensor
    bests: TileBests | None = None


def race_tensors(rows: RaceRows, scores: HeadScores) -> tuple[torch.Tensor | None, ...]:
    """In the order in which both kernels take them: `slots` to `logits` of race_tile, and of cuda/race.cuh."""
    bests = scores.bests
    assert bests is not None
    of_rows = (rows.slots_S, rows.positions_S, rows.wants_logits_S, rows.temperature_M, rows.seeds_M)
    return (*of_rows, bests.scores_ST, bests.tokens_ST, bests.logits_ST)


@triton.jit
def race_tile(
    logits_NS,
    first,
    num_rows,
    vocab,
    y,
    slots,
    positions,
    wants_logits,
    temperatures,
    seeds,
    scores,
    tokens,
    logits,
    first_token,
):
    """Stores what is wanted of HeadScores, in y, scores, tokens and logits: of all rows, one tile a program along axis 0.

    The tile's tokens are `first`, a multiple of four, and those after it; outside of rows and vocabulary it may hold anything.
    """
    n, m = first + tl.arange(0, logits_NS.shape[0]), tl.arange(0, logits_NS.shape[1])
    inside_N, inside_S = n < vocab, m < num_rows
    wanted_S = m < 0
    if wants_logits is not None:
        wanted_S = tl.load(wants_logits + m, inside_S, other=0) != 0
    tl.store(y + m.to(tl.int64)[None, :] * vocab + n[:, None], logits_NS, inside_N[:, None] & wanted_S[None, :])
    racing_S = inside_S & ~wanted_S
    slot_S = tl.load(slots + m, racing_S, other=0)
    temperature_S = tl.load(temperatures + slot_S, racing_S, other=0.0)
    scores_NS = logits_NS
    if tl.max(temperature_S, axis=0) > 0:
        seed_S, position_S = tl.load(seeds + slot_S, racing_S, other=0), tl.load(positions + m, racing_S, other=0)
        uniform_NS = uniform_columns(seed_S, position_S, first_token + first, logits_NS.shape[0])
        scores_NS += temperature_S[None, :] * gumbel(uniform_NS)
    scores_NS = tl.where(inside_N[:, None] & (scores_NS > -float("inf")), scores_NS, -float("inf"))  # NaN is not
    best_S = tl.max(scores_NS, axis=0)
    is_best_NS = scores_NS == best_S[None, :]
    token_S = tl.min(tl.where(is_best_NS, n[:, None], vocab - 1), axis=0)
    logit_S = tl.sum(tl.where(n[:, None] == token_S[None, :], logits_NS, 0.0), axis=0)
    place_S = m * tl.num_programs(0) + tl.program_id(0)
    tl.store(scores + place_S, best_S, racing_S)
    tl.store(tokens + place_S, token_S, racing_S)
    tl.store(logits + place_S, logit_S, racing_S)
