"""Sums of two ranks as a step in halves starts and awaits them, now one rank late, now the other."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from pilotfish.kernels.all_reduce import all_reduce_norm_ref
from pilotfish.models.parallel import StartedSum
from stream_ranks import make_parts

EPS = 1e-6
DTYPE = torch.bfloat16


class PushedTurns:
    """One rank's part. The addends change with each turn and each run, so that what is left of another sum is wrong."""

    NUM_RANKS, NUM_HALVES = 2, 2
    TURNS = 5  # odd, so that the last sums of a run and the first of the next have the same slots
    SHAPE = (2051, 1024)
    MAX_BYTES = 2051 * 1024 * DTYPE.itemsize

    def __init__(self, start_sum: Callable[[torch.Tensor], StartedSum], *, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.worst = torch.zeros(1, device=device)  # the largest error so far
        self._start_sum = start_sum
        self._addends = [self._random(self.NUM_RANKS, half, device) for half in range(self.NUM_HALVES)]
        (self._residual,) = self._random(1, 5, device)
        self._weight = self._residual[0].clone()
        self._count = torch.zeros(1, dtype=DTYPE, device=device)
        delays = random.Random(rank)
        self._cycles = [delays.choice((0, 0, 100_000, 400_000)) for _ in range(2 * self.NUM_HALVES * self.TURNS)]

    def run(self) -> list[torch.Tensor]:
        """What the last sums became behind the norm."""
        self._count.add_(1).remainder_(128)
        cycles, started = iter(self._cycles), [self._start(half, 0) for half in range(self.NUM_HALVES)]
        for turn in range(1, self.TURNS):
            for half in range(self.NUM_HALVES):
                torch.cuda._sleep(next(cycles))
                self._finish(started[half], half, turn - 1)
                torch.cuda._sleep(next(cycles))
                started[half] = self._start(half, turn)
        return [self._finish(started[half], half, self.TURNS - 1) for half in range(self.NUM_HALVES)]

    def _random(self, number: int, seed: int, device: torch.device) -> list[torch.Tensor]:
        """The same on every rank."""
        return [part.to(device) for part in make_parts(number, self.SHAPE, DTYPE, seed=seed)]

    def _parts(self, half: int, turn: int) -> list[torch.Tensor]:
        return [addend + (self._count + turn) for addend in self._addends[half]]

    def _start(self, half: int, turn: int) -> StartedSum:
        started = self._start_sum(self._parts(half, turn)[self.rank])
        assert started.other is not None
        return started

    def _finish(self, started: StartedSum, half: int, turn: int) -> torch.Tensor:
        y, new_residual = started.wait_and_norm(self._residual, self._weight, EPS)
        expected_y, expected_residual = all_reduce_norm_ref(self._parts(half, turn), self._residual, self._weight, EPS)
        error = (y - expected_y).abs().float() - 0.02 * expected_y.abs().float() - 0.01  # beyond the tolerance
        difference = (new_residual != expected_residual).float().max()
        self.worst.copy_(torch.stack([self.worst[0], difference, error.max()]).max())
        return y
