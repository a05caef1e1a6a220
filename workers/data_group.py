"""Between the data ranks of a replica: sparse layers' tokens on the device, and the leaders' words before a step on the host.

comm.py makes the process groups and joins them. As there, all ranks call the same in the same order, and each call ends within
the timeout of the group, with its result or with an exception.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from ..common.errors import InternalError
from ..common.rank_place import RankPlace
from ..models.parallel import DataParallel
from .peer_collectives import PeerCollectives


def finish(work: dist.Work | None) -> None:
    """A CPU waits here. On a GPU the current stream does; what was queued on that stream itself may come without work."""
    if work is not None:
        work.wait()


class DataGroup:
    """The ranks of one tensor rank, over all data ranks.

    Args:
        place: with the data rank as its rank.

    Attributes:
        peers: what small collectives go through; None where the process group serves alone.
    """

    def __init__(self, place: RankPlace, group: dist.ProcessGroup) -> None:
        self.group = group
        self.peers: PeerCollectives | None = None
        self.parallel = DataParallel(
            rank=place.rank,
            size=place.size,
            all_gather_rows=self._all_gather_rows,
            reduce_scatter_rows=self._reduce_scatter_rows,
            exchange_rows=self._exchange_rows,
        )
        self._size = place.size

    def _all_gather_rows(self, x_NH: torch.Tensor) -> torch.Tensor:
        if self.peers is not None and (parts := self.peers.all_gather(x_NH)) is not None:
            return parts.flatten(0, 1)
        x_NH = x_NH.contiguous()
        out_RH = x_NH.new_empty(self._size * len(x_NH), x_NH.shape[1])
        options = AllgatherOptions()
        options.asyncOp = False
        finish(self.group._allgather_base(out_RH, x_NH, options))
        return out_RH

    def _reduce_scatter_rows(self, x_RH: torch.Tensor) -> torch.Tensor:
        if self.peers is not None and (rows := self.peers.reduce_scatter(x_RH)) is not None:
            return rows
        x_RH = x_RH.contiguous()
        out_NH = x_RH.new_empty(len(x_RH) // self._size, x_RH.shape[1])
        options = dist.ReduceScatterOptions()
        options.asyncOp = False
        finish(self.group._reduce_scatter_base(out_NH, x_RH, options))
        return out_NH

    def _exchange_rows(self, x_SH: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        out_RH = x_SH.new_empty(sum(received), x_SH.shape[1])
        options = dist.AllToAllOptions()
        options.asyncOp = False
        finish(self.group.alltoall_base(out_RH, x_SH.contiguous(), list(received), list(sent), options))
        return out_RH


class StepExchange:
    """A few numbers of every data rank's leader to all of them."""

    def __init__(self, place: RankPlace, group: dist.ProcessGroup) -> None:
        self._place = place
        self.group = group

    def exchange(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """The numbers of every data rank, in their order.

        Raises:
            InternalError: another has ended, or has not come within the timeout.
        """
        place, own = self._place, torch.tensor([numbers], dtype=torch.int64)
        everyone = own.new_empty(place.size, len(numbers))
        try:
            finish(self.group._allgather_base(everyone, own))
        except RuntimeError as error:
            raise InternalError(
                f"data rank {place.rank} of {place.size} has lost another before a step, or waited {place.timeout_s:g} s "
                f"for it: {' '.join(str(error).split())[:200]}"
            ) from error
        return [tuple(row) for row in everyone.tolist()]
