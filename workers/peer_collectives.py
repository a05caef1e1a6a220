"""Small collectives of ranks on one machine through the memory that they share; larger ones are left to their process group.

A method answers None where the process group serves better, or must. That follows from the shape and dtype alone, so that all
ranks, which make the same calls, choose alike. All may be captured in CUDA graphs.

The limits are to be measured by benchmarks/gpu/bench_all_reduce.py.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..common.errors import InternalError
from ..kernels import all_gather, all_reduce, reduce_scatter
from ..kernels.peer_buffers import UNIT_BYTES, PeerBuffers

# Bytes that a rank sends in one shot, over all its links: up to here that beats two shots and NCCL.
MAX_ONE_SHOT_SENT_BYTES = 4 << 20
# Bytes of x up to which two shots beat NCCL, and of a rank's rows up to which a sum in parts does.
MAX_TWO_SHOT_BYTES = 4 << 20
MAX_SCATTERED_BYTES = 4 << 20
# Bytes of a rank's x; less, for each word goes with a mark.
MAX_GATHERED_BYTES = 512 << 10

Way = Literal["one_shot", "two_shot"]


def choose_way(num_bytes: int, num_ranks: int) -> Way | None:
    """How a sum goes through the buffers; None: not at all.

    Two ranks send each other everything in one shot, which is the least there is. More than two send (ranks - 1) times the
    message in one shot, 2 (ranks - 1) / ranks times in two.
    """
    if num_bytes * (num_ranks - 1) <= MAX_ONE_SHOT_SENT_BYTES:
        return "one_shot"
    return "two_shot" if num_ranks > 2 and num_bytes <= MAX_TWO_SHOT_BYTES else None


class PeerCollectives:
    """Of the ranks of `buffers`, as one of them calls them."""

    def __init__(self, buffers: PeerBuffers) -> None:
        self.buffers = buffers

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor | None:
        """The sum of every rank's x."""
        way = self._way(x)
        return None if way is None else all_reduce.all_reduce(_aligned(x), self.buffers, two_shot=way == "two_shot")

    def all_reduce_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(rms_norm(s), s), where s is the residual plus the sum of every rank's x."""
        way = self._way(x_TH)
        if way is None or x_TH.shape[1] > all_reduce.MAX_HIDDEN:
            return None
        return all_reduce.all_reduce_norm(
            _aligned(x_TH), _aligned(residual_TH), weight_H, eps, self.buffers, two_shot=way == "two_shot"
        )

    def reduce_scatter(self, x_RH: torch.Tensor) -> torch.Tensor | None:
        """This rank's rows of the sum of every rank's x."""
        if reduce_scatter.unfit_reason(x_RH.shape, x_RH.dtype, self.buffers) is not None:
            return None
        if x_RH.nbytes > self.buffers.size * MAX_SCATTERED_BYTES:
            return None
        return reduce_scatter.reduce_scatter(_aligned(x_RH), self.buffers)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """[ranks, *x.shape], every rank's x in their order."""
        if x.nbytes > MAX_GATHERED_BYTES or all_gather.unfit_reason(x.shape, x.dtype, self.buffers) is not None:
            return None
        return all_gather.all_gather(_aligned(x), self.buffers)

    def check(self) -> None:
        """Asked when a step has ended, before its results are used: InternalError where it waited in vain for a rank."""
        if self.buffers.failure:
            raise InternalError(f"{self.buffers.failure}: the step is void")

    def _way(self, x: torch.Tensor) -> Way | None:
        if all_reduce.unfit_reason(x.shape, x.dtype, self.buffers) is not None:
            return None
        return choose_way(x.nbytes, self.buffers.size)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x itself, or a copy, as the kernels want it: contiguous, from a multiple of UNIT_BYTES on."""
    x = x.contiguous()
    return x if x.data_ptr() % UNIT_BYTES == 0 else x.clone()
