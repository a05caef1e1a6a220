"""Between the data ranks of a replica: tokens of sparse layers on the device, and the leaders' words before each step on the
host.

comm.py makes the process groups and joins them. As there, all ranks call the same in the same order, and each call ends within
the timeout of the group, with its result or with an exception.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..common.errors import InternalError
from ..common.rank_place import RankPlace
from ..models.parallel import DataParallel


class DataGroup:
    """The ranks of one tensor rank, over all data ranks.

    Args:
        place: with the data rank as its rank.
    """

    def __init__(self, place: RankPlace, group: dist.ProcessGroup) -> None:
        self.group = group
        self.parallel = DataParallel(
            rank=place.rank,
            size=place.size,
            all_gather_rows=self._all_gather_rows,
            reduce_scatter_rows=self._reduce_scatter_rows,
            exchange_rows=self._exchange_rows,
        )
        self._size = place.size

    def _all_gather_rows(self, x_NH: torch.Tensor) -> torch.Tensor:
        x_NH = x_NH.contiguous()
        out_RH = x_NH.new_empty(self._size * len(x_NH), x_NH.shape[1])
        self.group._allgather_base(out_RH, x_NH).wait()
        return out_RH

    def _reduce_scatter_rows(self, x_RH: torch.Tensor) -> torch.Tensor:
        x_RH = x_RH.contiguous()
        out_NH = x_RH.new_empty(len(x_RH) // self._size, x_RH.shape[1])
        self.group._reduce_scatter_base(out_NH, x_RH, dist.ReduceScatterOptions()).wait()
        return out_NH

    def _exchange_rows(self, x_SH: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        out_RH = x_SH.new_empty(sum(received), x_SH.shape[1])
        self.group.alltoall_base(out_RH, x_SH.contiguous(), list(received), list(sent), dist.AllToAllOptions()).wait()
        return out_RH


class StepExchange:
    """A few numbers of every data rank's leader to all of them."""

    def __init__(self, place: RankPlace, group: dist.ProcessGroup) -> None:
        self._place = place
        self._group = group

    def exchange(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """The numbers of every data rank, in their order.

        Raises:
            InternalError: another has ended, or has not come within the timeout.
        """
        place, own = self._place, torch.tensor([numbers], dtype=torch.int64)
        everyone = own.new_empty(place.size, len(numbers))
        try:
            self._group._allgather_base(everyone, own).wait()
        except RuntimeError as error:
            raise InternalError(
                f"data rank {place.rank} of {place.size} has lost another before a step, or waited {place.timeout_s:g} s "
                f"for it: {' '.join(str(error).split())[:200]}"
            ) from error
        return [tuple(row) for row in everyone.tolist()]
