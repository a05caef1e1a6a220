"""One rank's place in a tensor-parallel replica, and which share of each weight it owns.

Passed explicitly when a model is built; nothing looks it up. A share says which rows or columns of a checkpoint tensor this
rank keeps; the two collectives are given by whoever owns the process group (workers), so that models know no NCCL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..common.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class Share:
    """The half-open range [start, stop) of a dimension of `total`."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def range(self) -> slice:
        return slice(self.start, self.stop)


def whole(total: int) -> Share:
    return Share(0, total, total)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """Rank `rank` of `size`.

    Attributes:
        all_reduce: sums a tensor over the ranks and returns it.
        all_gather: joins every rank's equally shaped tensor along the last dimension, in rank order.
    """

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    all_gather: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} must be in [0, {self.size})")
        if self.size > 1 and (self.all_reduce is None or self.all_gather is None):
            raise ValueError(f"{self.size} ranks need all_reduce and all_gather")

    def share(self, total: int, *, what: str, unit: int = 1) -> Share:
        """This rank's equal part of `total` things of `unit` rows each. ModelLoadError where it does not divide."""
        if total % self.size:
            raise ModelLoadError(
                f"{what} {total} cannot be split over {self.size} ranks: use a number of ranks that divides it"
            )
        part = total // self.size * unit
        return Share(self.rank * part, (self.rank + 1) * part, total * unit)

    def kv_head_share(self, num_kv_heads: int, *, unit: int) -> Share:
        """As `share`, but with fewer heads than ranks each head is kept by several ranks."""
        if num_kv_heads >= self.size or self.size % num_kv_heads:
            return self.share(num_kv_heads, what="the number of key/value heads", unit=unit)
        head = self.rank * num_kv_heads // self.size
        return Share(head * unit, (head + 1) * unit, num_kv_heads * unit)

    def vocab_share(self, vocab_size: int) -> Share:
        """Equal parts rounded up; the last ranks may own less."""
        part = -(-vocab_size // self.size)
        return Share(min(self.rank * part, vocab_size), min((self.rank + 1) * part, vocab_size), vocab_size)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x."""
        return x if self.all_reduce is None else self.all_reduce(x)

    def gather_vocab(self, x_RV: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Joins the vocabulary shares of all ranks: [R, vocab_size]."""
        if self.all_gather is None:
            return x_RV
        part = -(-vocab_size // self.size)
        padded_RV = torch.nn.functional.pad(x_RV, (0, part - x_RV.shape[1]))
        return self.all_gather(padded_RV)[:, :vocab_size]
