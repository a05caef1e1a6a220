"""A head's part in the draw: which numbers its race wants, and what it leaves behind (head_race.py, sampling.py).

S rows, M slots, V vocabulary of this rank, T tiles of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
