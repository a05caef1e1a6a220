"""A batch computed in halves: rows across the border, rows without tokens in one half, rows that go on; and when it is."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from pilotfish.models.build import load_model
from pilotfish.models.dummy import build_dummy
from pilotfish.models.paged_sequences import PagedSequences
from pilotfish.models.parallel import Parallel, StartedSum


class Starts:
    """A "sum" over one rank, and how often it was started before the one before it was waited for."""

    def __init__(self) -> None:
        self.under_way = 0
        self.most_under_way = 0

    def __call__(self, x: torch.Tensor) -> StartedSum:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return StartedSum(x, self._finish)

    def _finish(self) -> None:
        self.under_way -= 1


def test_halves_equal_the_whole(llama: Path) -> None:
    starts = Starts()
    whole, halved = (
        PagedSequences(load_model(llama, device="cpu", parallel=parallel), num_sequences=4, max_len=64)
        for parallel in (Parallel(), Parallel(start_sum=starts))
    )
    tokens = random.Random(5)
    # A row across the border; the border between rows; a row longer than half; an odd number; one token alone.
    for lengths in ({0: 5, 1: 9, 2: 3}, {0: 4, 1: 4}, {3: 20, 0: 1}, {1: 1, 2: 1, 3: 1}, {0: 1, 2: 30}, {1: 1}):
        new = {row: tokens.choices(range(131), k=length) for row, length in lengths.items()}
        torch.testing.assert_close(halved.append(new), whole.append(new), rtol=1e-4, atol=1e-5)
    assert (starts.under_way, starts.most_under_way) == (0, 2)


def test_halves_are_of_large_steps_and_of_larger_ones_where_layers_are_sparse() -> None:
    row_bytes = 64 * 4
    for name, least in (("dummy:tiny", 20), ("dummy:tiny-moe", 30)):
        starts = Starts()
        parallel = Parallel(start_sum=starts, min_started_bytes=10 * row_bytes, min_sparse_half_tokens=15)
        model = build_dummy(name, device="cpu", dtype="float32", parallel=parallel)
        paged = PagedSequences(model, num_sequences=1, max_len=100)
        for num_tokens, num_halves in ((least - 1, 0), (least, 2)):
            paged.append({0: [1] * num_tokens})
            assert starts.most_under_way == num_halves, (name, num_tokens)
