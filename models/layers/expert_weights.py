"""The experts of one sparse layer that a rank keeps: their weights, where a checkpoint has them, and what they compute.

T tokens, H hidden, C choices, E experts; S slots of this rank, each with one expert's weights, F intermediate size of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...kernels.expert_terms import Summands
from ...kernels.gated_activation import Activation
from ...kernels.moe_mlp import moe_mlp
from ..parallel import Share
from ..weight_source import Placement, WeightSource

_ALL = slice(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNames:
    """How a checkpoint names one sparse layer's tensors, below the decoder layer.

    Attributes:
        router: of the router's weight, without ".weight".
        gate, up, down: with "{expert}" in the name one tensor an expert, else one tensor for all with a leading expert
            dimension. The same name for gate and up means that the tensor holds both, gate rows first.
        by_columns: the tensors for all experts are stored as inputs x outputs, gate and up column by column.
    """

    router: str
    gate: str
    up: str
    down: str
    by_columns: bool = False


class ExpertWeights(torch.nn.Module):
    """A part of SparseMlp.

    Args:
        intermediate: less than all of it where ranks share every expert.
        bias: both products have one, whose tensors for all experts are called as the weights with "_bias" behind.
    """

    def __init__(
        self,
        names: ExpertNames,
        *,
        num_experts: int,
        hidden_size: int,
        activation: Activation,
        slots: Share,
        intermediate: Share,
        bias: bool,
        placement: Placement,
    ) -> None:
        super().__init__()
        assert "{expert}" not in names.down or not bias, "no family has biases with tensors for each expert"
        self.names, self.activation, self.num_experts, self.intermediate = names, activation, num_experts, intermediate
        self.gate_up_weight = placement.matrix(slots.size, 2 * intermediate.size, hidden_size)
        self.down_weight = placement.matrix(slots.size, hidden_size, intermediate.size)
        self.gate_up_bias = placement.bias(slots.size, 2 * intermediate.size) if bias else None
        self.down_bias = placement.bias(slots.size, hidden_size) if bias else None
        # Where ranks share every expert it belongs to their sum, so one rank alone adds it.
        self.adds_down_bias = intermediate.size == intermediate.total or placement.parallel.rank == 0

    @property
    def of_slots(self) -> tuple[torch.Tensor, ...]:
        """All that an expert is, each [S, ...]."""
        tensors = (self.gate_up_weight, self.down_weight, self.gate_up_bias, self.down_bias)
        return tuple(tensor for tensor in tensors if tensor is not None)

    def run(self, x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor) -> Summands:
        """The weighted sum, or its terms, of each token's choices among this rank's slots, from 0; -1 is another rank's."""
        return moe_mlp(
            x_TH,
            self.gate_up_weight,
            self.down_weight,
            weights_TC,
            slots_TC,
            self.activation,
            gate_up_bias_EU=self.gate_up_bias,
            down_bias_EH=self.down_bias if self.adds_down_bias else None,
        )

    def weight_sources(self, prefix: str, own_experts: Sequence[int]) -> Iterator[WeightSource]:
        """`own_experts`: of the slots, in their order."""
        if "{expert}" in self.names.down:
            yield from self._sources_per_expert(prefix, own_experts)
            return
        assert self.names.gate == self.names.up
        fused = self._sources_by_columns if self.names.by_columns else self._sources_by_rows
        for experts, slots in _runs(own_experts):
            yield from fused(prefix, experts, slots)

    def _sources_per_expert(self, prefix: str, own_experts: Sequence[int]) -> Iterator[WeightSource]:
        """Of other ranks' experts no row is read."""
        hidden, rows = self.gate_up_weight.shape[2], self.intermediate
        for expert in range(self.num_experts):
            is_mine = expert in own_experts
            index = own_experts.index(expert) if is_mine else 0
            kept_rows = rows.range if is_mine else slice(0, 0)
            gate, up = self.gate_up_weight[index].split(rows.size)
            for name, target in ((self.names.gate, gate), (self.names.up, up)):
                yield WeightSource(
                    name=prefix + name.format(expert=expert),
                    shape=(rows.total, hidden),
                    region=(kept_rows, _ALL),
                    target=target if is_mine else target[:0],
                )
            down = self.down_weight[index]
            yield WeightSource(
                name=prefix + self.names.down.format(expert=expert),
                shape=(hidden, rows.total),
                region=(_ALL, rows.range) if is_mine else (slice(0, 0), _ALL),
                target=down if is_mine else down[:0],
            )

    def _sources_by_rows(self, prefix: str, experts: slice, slots: slice) -> Iterator[WeightSource]:
        hidden, rows = self.gate_up_weight.shape[2], self.intermediate
        assert self.gate_up_bias is None, "no family has biases and such tensors"
        gate, up = self.gate_up_weight[slots].split(rows.size, dim=1)
        for first_row, target in ((0, gate), (rows.total, up)):
            yield WeightSource(
                name=prefix + self.names.gate,
                shape=(self.num_experts, 2 * rows.total, hidden),
                region=(experts, slice(first_row + rows.start, first_row + rows.stop), _ALL),
                target=target,
            )
        yield WeightSource(
            name=prefix + self.names.down,
            shape=(self.num_experts, hidden, rows.total),
            region=(experts, _ALL, rows.range),
            target=self.down_weight[slots],
        )

    def _sources_by_columns(self, prefix: str, experts: slice, slots: slice) -> Iterator[WeightSource]:
        (_, num_rows, hidden), rows = self.gate_up_weight.shape, self.intermediate
        gate_up, down = prefix + self.names.gate, prefix + self.names.down
        for parity, half in ((0, slice(rows.size)), (1, slice(rows.size, num_rows))):
            columns = slice(2 * rows.start + parity, 2 * rows.stop, 2)
            yield WeightSource(
                name=gate_up,
                shape=(self.num_experts, hidden, 2 * rows.total),
                region=(experts, _ALL, columns),
                target=self.gate_up_weight[slots, half].transpose(1, 2),
            )
            if self.gate_up_bias is not None:
                yield WeightSource(
                    name=f"{gate_up}_bias",
                    shape=(self.num_experts, 2 * rows.total),
                    region=(experts, columns),
                    target=self.gate_up_bias[slots, half],
                )
        yield WeightSource(
            name=down,
            shape=(self.num_experts, rows.total, hidden),
            region=(experts, rows.range, _ALL),
            target=self.down_weight[slots].transpose(1, 2),
        )
        if self.down_bias is not None:
            yield WeightSource(
                name=f"{down}_bias",
                shape=(self.num_experts, hidden),
                region=(experts, _ALL),
                target=self.down_bias[slots],
            )


def _runs(experts: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """(experts, their slots of this rank) for each run of experts that follow one another."""
    start = 0
    for stop in range(1, len(experts) + 1):
        if stop == len(experts) or experts[stop] != experts[stop - 1] + 1:
            yield slice(experts[start], experts[stop - 1] + 1), slice(start, stop)
            start = stop
