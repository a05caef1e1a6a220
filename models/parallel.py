"""One rank's place among those that compute a replica, and which share of each weight it owns.

Passed explicitly when a model is built; nothing looks it up. A share says which rows or columns of a checkpoint tensor this
rank keeps; the collectives are given by whoever owns the process group (workers), so that models know no NCCL.

Nothing has to divide: parts are contiguous, in rank order and as even as they can be.

Tensor ranks have the same tokens and share every layer. Data ranks have tokens of their own and each a whole attention (of one
or several tensor ranks); they share the experts of sparse layers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..common.errors import ModelLoadError
from ..kernels.expert_terms import ExpertTerms, sum_terms, sum_terms_and_norm
from ..kernels.rms_norm import rms_norm


@dataclass(frozen=True, slots=True)
class StartedSum:
    """A sum over ranks under way. Work queued before `finish` runs beside it and may not touch its tensors.

    Attributes:
        x: this rank's addend, which becomes the sum; with `other` it stays the addend.
        finish: what is queued behind it finds the tensors as they are at the end.
        other: what the other of two ranks adds, for whoever reads x to add; to be read before another sum is started.
    """

    x: torch.Tensor
    finish: Callable[[], object]
    other: torch.Tensor | None = None

    def wait_and_norm(self, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """As Parallel.sum_and_norm."""
        self.finish()
        return rms_norm(self.x, weight_H, eps, residual_TH=residual_TH, addend_TH=self.other)


# What a rank adds to the sum over ranks, the terms of it, or that sum under way.
Addend: TypeAlias = torch.Tensor | ExpertTerms | StartedSum
AllReduceNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]

# Elements: 16 bytes of a 16-bit dtype, as vector loads and TMA want the rows of a weight to begin.
ALIGNED = 8

# The number of a layer's experts to the expert in each slot of all ranks.
FirstSlots = Callable[[int], Sequence[int]]


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


@dataclass(kw_only=True, slots=True)
class DataParallel:
    """Data rank `rank` of `size`, and what moves between the ranks that have one tensor rank.

    The collectives are as those of Parallel. H is whatever a row holds; N, R and S are numbers of rows.

    Attributes:
        all_gather_rows: joins every rank's [N, H], of one shape, along the rows: [size * N, H] in rank order.
        reduce_scatter_rows: sums every rank's [size * N, H]; each gets its own N rows of the sum.
        exchange_rows: (x [S, H], rows sent to each rank, rows received from each) -> [R, H]. x lies in the order of the ranks
            that its rows go to, the result in the order of those they come from.
        rank_tokens: of every data rank in the step that is computed: set by `begin`, for all layers alike.
        is_padding_T: of that step: bool, the tokens that need no experts, where it may be captured in a CUDA graph: its shapes
            are fixed and nothing in it may wait for the device. None of other steps.
    """

    rank: int
    size: int
    all_gather_rows: Callable[[torch.Tensor], torch.Tensor]
    reduce_scatter_rows: Callable[[torch.Tensor], torch.Tensor]
    exchange_rows: Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]
    rank_tokens: tuple[int, ...] = ()
    is_padding_T: torch.Tensor | None = None

    def begin(self, rank_tokens: tuple[int, ...], *, num_tokens: int, is_padding_T: torch.Tensor | None = None) -> None:
        """A forward pass starts, here with `num_tokens`. ValueError where that is not what the ranks have agreed on."""
        if len(rank_tokens) != self.size or rank_tokens[self.rank] != num_tokens:
            raise ValueError(f"{num_tokens} tokens on data rank {self.rank} of {self.size}, which agreed on {rank_tokens}")
        self.rank_tokens, self.is_padding_T = rank_tokens, is_padding_T


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """Tensor rank `rank` of `size`, perhaps of one data rank of several.

    Every rank calls the same collectives in the same order, with tensors of the same shape and dtype, and goes on with the
    result: they are ordered with the device's work like a kernel, and may be captured in a CUDA graph.

    Attributes:
        first_slots: where experts are loaded. With it they may move and have copies (layers/expert_map.py), and all ranks have
            equally many slots.
        all_reduce: sums a contiguous tensor over the ranks and returns it; it may work in place.
        all_gather: joins every rank's contiguous, equally shaped tensor along the last dimension, in rank order.
        all_reduce_norm: (x, residual, weight, eps) to what `sum_and_norm` says, for whoever can do it in one.
        start_sum: begins what all_reduce does of a contiguous tensor; None where nothing could run beside it.
        min_started_bytes: a smaller tensor is better summed at once.
        min_sparse_half_tokens: with sparse layers a step is computed in halves from so many tokens a half on.
        whole_experts: ranks share the experts of a sparse layer (expert parallelism), not each expert's intermediate size.
        data: where there are several data ranks; all ranks of all of them share the experts, so `whole_experts` is set.
    """

    rank: int = 0
    size: int = 1
    whole_experts: bool = False
    first_slots: FirstSlots | None = None
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    all_gather: Callable[[torch.Tensor], torch.Tensor] | None = None
    all_reduce_norm: AllReduceNorm | None = None
    start_sum: Callable[[torch.Tensor], StartedSum] | None = None
    min_started_bytes: int = 0
    min_sparse_half_tokens: int = 0
    data: DataParallel | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} must be in [0, {self.size})")
        if self.size > 1 and (self.all_reduce is None or self.all_gather is None):
            raise ValueError(f"{self.size} ranks need all_reduce and all_gather")
        if self.first_slots is not None and not self.whole_experts:
            raise ValueError("first_slots are of whole experts")
        if self.data is not None and not self.whole_experts:
            raise ValueError("data ranks share whole experts: whole_experts must be set")

    def share(self, total: int, *, what: str, unit: int = 1, multiple: int = 1) -> Share:
        """This rank's part of `total` things of `unit` rows each: never none.

        Parts are whole multiples of `multiple` things (of a half, a quarter... of it where there are fewer of them than ranks),
        with what is left over in the last. ModelLoadError for fewer things than ranks.
        """
        return _share(total, self.rank, self.size, what=what, unit=unit, multiple=multiple)

    def expert_shares(self, num_experts: int, intermediate_size: int) -> tuple[Share, Share]:
        """(experts, intermediate size of each) that this rank keeps of a sparse layer. ModelLoadError for too few."""
        if self.whole_experts:
            return self.expert_share(num_experts, 0 if self.data is None else self.data.rank), whole(intermediate_size)
        intermediate = self.share(intermediate_size, what="the experts' intermediate size", multiple=ALIGNED)
        return whole(num_experts), intermediate

    def expert_share(self, num_experts: int, data_rank: int) -> Share:
        """The experts that the rank beside this one keeps, of this tensor rank and of data rank `data_rank`."""
        num_ranks = self.size * (1 if self.data is None else self.data.size)
        return _share(num_experts, data_rank * self.size + self.rank, num_ranks, what="the number of experts")

    def kv_head_share(self, num_kv_heads: int, *, unit: int) -> Share:
        """As `share`; where heads are fewer than ranks, each is kept by one or several ranks."""
        if num_kv_heads >= self.size:
            return self.share(num_kv_heads, what="the number of key/value heads", unit=unit)
        head = self.rank * num_kv_heads // self.size
        return Share(head * unit, (head + 1) * unit, num_kv_heads * unit)

    def query_head_share(self, num_heads: int, num_kv_heads: int, *, unit: int) -> Share:
        """The query heads that read this rank's kv heads; ranks that keep the same kv head share its query heads.

        So every rank has the same number of query heads for each of its kv heads, as attention kernels want it.
        ModelLoadError for fewer query heads than ranks.
        """
        if num_heads < self.size:
            raise ModelLoadError(
                f"the {num_heads} attention heads cannot be split over {self.size} ranks: use at most {num_heads} ranks; "
                f"{_equal_sizes(num_heads, num_kv_heads)} share them equally"
            )
        group, kv = num_heads // num_kv_heads, self.kv_head_share(num_kv_heads, unit=1)
        if num_kv_heads >= self.size:
            return Share(kv.start * group * unit, kv.stop * group * unit, num_heads * unit)
        first, behind = (_first(head, self.size, num_kv_heads) for head in (kv.start, kv.stop))  # the ranks that keep it
        start, stop = (kv.start * group + _first(rank - first, group, behind - first) for rank in (self.rank, self.rank + 1))
        return Share(start * unit, stop * unit, num_heads * unit)

    def vocab_share(self, vocab_size: int) -> Share:
        """Equal parts, rounded up to a multiple of four as the sampler's random numbers come; the last rank may own less.

        ModelLoadError where it would own nothing.
        """
        part = self._vocab_part(vocab_size)
        if (self.size - 1) * part >= vocab_size:
            raise ModelLoadError(f"a vocabulary of {vocab_size} tokens cannot be split over {self.size} ranks")
        return Share(self.rank * part, min((self.rank + 1) * part, vocab_size), vocab_size)

    def _vocab_part(self, vocab_size: int) -> int:
        return vocab_size if self.size == 1 else -(-vocab_size // (4 * self.size)) * 4

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x."""
        return x if self.all_reduce is None else self.all_reduce(x)

    def sum_and_norm(
        self, x_TH: Addend, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(s), s), where s is the residual plus the sum of every rank's x."""
        if isinstance(x_TH, StartedSum):
            return x_TH.wait_and_norm(residual_TH, weight_H, eps)
        if isinstance(x_TH, ExpertTerms):
            if self.size == 1:
                return sum_terms_and_norm(x_TH, residual_TH, weight_H, eps)
            x_TH = sum_terms(x_TH)
        if self.all_reduce_norm is not None:
            return self.all_reduce_norm(x_TH, residual_TH, weight_H, eps)
        return rms_norm(self.sum(x_TH), weight_H, eps, residual_TH=residual_TH)

    def gather_vocab(self, x_RV: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Joins the vocabulary shares of all ranks: [R, vocab_size] on every rank, rows contiguous, equal to the bit."""
        if self.all_gather is None:
            return x_RV
        part = self._vocab_part(vocab_size)
        if x_RV.shape[1] < part:
            x_RV = torch.nn.functional.pad(x_RV, (0, part - x_RV.shape[1]))
        return self.all_gather(x_RV)[:, :vocab_size]


def _share(total: int, rank: int, size: int, *, what: str, unit: int = 1, multiple: int = 1) -> Share:
    """See Parallel.share."""
    if total < size:
        raise ModelLoadError(f"{what} {total} cannot be split over {size} ranks: use at most {total} ranks")
    run = multiple
    while -(-total // run) < size:
        run //= 2
    start, stop = (min(run * _first(part, -(-total // run), size), total) for part in (rank, rank + 1))
    return Share(start * unit, stop * unit, total * unit)


def _first(part: int, total: int, num_parts: int) -> int:
    """Where part `part` begins when `total` things are dealt as evenly as possible; the first part is one of the larger."""
    return -(-part * total // num_parts)


def _equal_sizes(num_heads: int, num_kv_heads: int) -> str:
    """Numbers of ranks for which every rank has equally many query heads and kv heads."""
    group = num_heads // num_kv_heads
    sizes = {size for size in range(1, num_kv_heads + 1) if num_kv_heads % size == 0}
    sizes |= {num_kv_heads * parts for parts in range(1, group + 1) if group % parts == 0}
    return ", ".join(map(str, sorted(sizes)))
