"""Linear layers: one weight, filled from one or several checkpoint tensors stacked by rows, split over ranks.

Column-parallel: a rank keeps a share of the rows of each part (its outputs). Row-parallel: it keeps a share of the columns (its
inputs) and computes what it adds to the sum over ranks, its addend; whoever uses the layer sums (the norm behind it, norm.py).

T tokens, K inputs, N outputs of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...kernels.linear import linear
from ..parallel import Share, whole
from ..weight_source import Placement, WeightSource


class Linear(torch.nn.Module):
    """y = x @ weight.T + bias.

    Args:
        parts: checkpoint names of what is stacked, each with the rows this rank keeps. {"q_proj": ..., "k_proj": ...}
        columns: the inputs this rank keeps; less than all of them makes the layer row-parallel.
    """

    def __init__(self, parts: Mapping[str, Share], columns: Share, *, bias: bool, placement: Placement) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.columns = columns
        num_rows = sum(share.size for share in self.parts.values())
        self.weight = placement.matrix(num_rows, columns.size)
        self.bias = placement.bias(num_rows) if bias else None
        # A row-parallel layer's bias belongs to the sum, so one rank alone adds it.
        self.adds_bias = columns.size == columns.total or placement.parallel.rank == 0

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """y [T, N]; of a row-parallel layer this rank's addend."""
        return linear(x_TK, self.weight, self.bias if self.adds_bias else None)

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        """`prefix` ends with a dot, or is empty."""
        start = 0
        for name, rows in self.parts.items():
            target = slice(start, start + rows.size)
            yield WeightSource(
                name=f"{prefix}{name}.weight",
                shape=(rows.total, self.columns.total),
                region=(rows.range, self.columns.range),
                target=self.weight[target],
            )
            if self.bias is not None:
                yield WeightSource(
                    name=f"{prefix}{name}.bias", shape=(rows.total,), region=(rows.range,), target=self.bias[target]
                )
            start += rows.size


def column_linear(parts: Mapping[str, Share], num_inputs: int, *, bias: bool, placement: Placement) -> Linear:
    """Each rank computes its share of the outputs."""
    return Linear(parts, whole(num_inputs), bias=bias, placement=placement)


def row_linear(name: str, num_outputs: int, inputs: Share, *, bias: bool, placement: Placement) -> Linear:
    """Each rank multiplies its share of the inputs; the sum of the addends is the output."""
    return Linear({name: whole(num_outputs)}, inputs, bias=bias, placement=placement)
