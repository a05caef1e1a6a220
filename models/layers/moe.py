"""Mixture-of-experts MLP: router x dispatcher x grouped GEMM.

The router chooses each token's experts, the map says in which slots their weights lie (expert_map.py), the dispatcher brings
tokens and slots together (expert_dispatch.py), and one grouped op computes the gated MLPs of this rank's slots.

T tokens, H hidden, C choices. Ranks share every expert's intermediate size, or the slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import torch

from ...kernels.linear import linear
from ...kernels.moe_mlp import moe_mlp
from ...kernels.moe_routing import route_tokens
from ...kernels.norm_and_route import norm_and_route
from ..model_shape import ModelShape, MoeShape
from ..parallel import Addend, StartedSum, whole
from ..weight_source import Placement, WeightSource
from .expert_choice import ExpertChoice
from .expert_dispatch import choose_dispatcher
from .expert_map import build_map
from .linear import column_linear
from .norm import RmsNorm
from .shared_experts import SharedExperts

Chosen = tuple[torch.Tensor, torch.Tensor]  # each token's weights [T, C] and experts [T, C]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNames:
    """How a checkpoint names one sparse layer's tensors, below the decoder layer.

    Attributes:
        router: of the router's weight, without ".weight".
        gate, up, down: with "{expert}" in the name one tensor an expert, else one tensor for all with a leading expert
            dimension. The same name for gate and up means that the tensor holds both, gate rows first.
    """

    router: str
    gate: str
    up: str
    down: str


class SparseMlp(torch.nn.Module):
    """Stands where a dense layer has its Mlp.

    Args:
        layouts: the namings a checkpoint of this family may use; the first that the checkpoint's names fit is taken.
        prefix: of the decoder layer in the checkpoint, with its dot.
        correction: the checkpoint's name of the correction of scores.
        shared: what every token goes through besides.
    """

    def __init__(
        self,
        shape: ModelShape,
        moe: MoeShape,
        *,
        layouts: tuple[ExpertNames, ...],
        checkpoint_names: Set[str],
        prefix: str,
        placement: Placement,
        correction: str | None = None,
        shared: SharedExperts | None = None,
    ) -> None:
        super().__init__()
        self.names = next((names for names in layouts if prefix + names.down.format(expert=0) in checkpoint_names), layouts[0])
        self.moe = moe
        self.choice = None
        if moe.scoring is not None and not (moe.scoring.is_plain and correction is None):
            self.choice = ExpertChoice(moe, moe.scoring, correction=correction, placement=placement)
        self.shared = shared
        self.activation = shape.activation
        self.parallel = placement.parallel
        self.map = build_map(moe.num_experts, placement.parallel, device=placement.device)
        self.slots, self.intermediate = self.parallel.expert_shares(self.map.num_slots, moe.intermediate_size)
        self.dispatcher = choose_dispatcher(self.parallel, self.slots, device=placement.device)
        self.router = column_linear(
            {self.names.router: whole(moe.num_experts)}, shape.hidden_size, bias=False, placement=placement
        )
        self.gate_up_weight = placement.matrix(self.slots.size, 2 * self.intermediate.size, shape.hidden_size)
        self.down_weight = placement.matrix(self.slots.size, shape.hidden_size, self.intermediate.size)

    @property
    def slot_weights(self) -> tuple[torch.Tensor, ...]:
        """All that an expert is, each [slots of this rank, ...]."""
        return self.gate_up_weight, self.down_weight

    def norm_and_choose(
        self, norm: RmsNorm, x_TH: Addend, residual_TH: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Chosen | None]:
        """(norm(s), s, what `forward` takes beside the first), where s is the residual and every rank's addend x.

        One op where the choice is a plain one and x is whole on each rank.
        """
        if self.choice is not None or residual_TH is None or isinstance(x_TH, StartedSum) or norm.parallel.size > 1:
            return *norm.add_and_norm(x_TH, residual_TH), None
        y_TH, sum_TH, weights_TC, experts_TC = norm_and_route(
            x_TH, residual_TH, norm.weight, norm.eps, self.router.weight, self.moe.top_k, renormalize=self.moe.renormalize
        )
        return y_TH, sum_TH, (weights_TC, experts_TC)

    def forward(self, x_TH: torch.Tensor, chosen: Chosen | None = None) -> torch.Tensor:
        """What this rank adds to the sum over ranks. `chosen`: what `choose` answers for x, where that is known."""
        weights_TC, experts_TC = self.choose(x_TH) if chosen is None else chosen
        out_TH = self.dispatcher.run(x_TH, weights_TC, self.map.slots(experts_TC), self._experts)
        if self.shared is not None:
            out_TH = out_TH + self.shared.addend(x_TH)
        return out_TH

    def choose(self, x_TH: torch.Tensor) -> Chosen:
        """Each token's weights [T, C] and experts [T, C]."""
        if self.choice is None:
            return route_tokens(self.router.forward(x_TH), self.moe.top_k, renormalize=self.moe.renormalize)
        return self.choice.choose(linear(x_TH, self.router.weight, out_dtype=torch.float32))

    def _experts(self, x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor) -> torch.Tensor:
        return moe_mlp(x_TH, self.gate_up_weight, self.down_weight, weights_TC, slots_TC, self.activation)

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        yield from self.router.weight_sources(prefix)
        if self.choice is not None:
            yield from self.choice.weight_sources(prefix)
        if "{expert}" in self.names.down:
            yield from self._sources_per_expert(prefix)
        else:
            yield from self._fused_sources(prefix)
        if self.shared is not None:
            yield from self.shared.weight_sources(prefix)

    def _sources_per_expert(self, prefix: str) -> Iterator[WeightSource]:
        """Of other ranks' experts no row is read."""
        hidden, rows = self.gate_up_weight.shape[2], self.intermediate
        own = self.map.experts_in(self.slots)
        for expert in range(self.moe.num_experts):
            is_mine = expert in own
            index = own.index(expert) if is_mine else 0
            kept_rows = rows.range if is_mine else slice(0, 0)
            gate, up = self.gate_up_weight[index].split(rows.size)
            for name, target in ((self.names.gate, gate), (self.names.up, up)):
                yield WeightSource(
                    name=prefix + name.format(expert=expert),
                    shape=(rows.total, hidden),
                    region=(kept_rows, slice(None)),
                    target=target if is_mine else target[:0],
                )
            down = self.down_weight[index]
            yield WeightSource(
                name=prefix + self.names.down.format(expert=expert),
                shape=(hidden, rows.total),
                region=(slice(None), rows.range) if is_mine else (slice(0, 0), slice(None)),
                target=down if is_mine else down[:0],
            )

    def _fused_sources(self, prefix: str) -> Iterator[WeightSource]:
        assert self.names.gate == self.names.up
        num_experts, hidden, rows = self.moe.num_experts, self.gate_up_weight.shape[2], self.intermediate
        for experts, slots in _runs(self.map.experts_in(self.slots)):
            gate, up = self.gate_up_weight[slots].split(rows.size, dim=1)
            for first_row, target in ((0, gate), (rows.total, up)):
                yield WeightSource(
                    name=prefix + self.names.gate,
                    shape=(num_experts, 2 * rows.total, hidden),
                    region=(experts, slice(first_row + rows.start, first_row + rows.stop), slice(None)),
                    target=target,
                )
            yield WeightSource(
                name=prefix + self.names.down,
                shape=(num_experts, hidden, rows.total),
                region=(experts, slice(None), rows.range),
                target=self.down_weight[slots],
            )


def _runs(experts: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """(experts, their slots of this rank) for each run of experts that follow one another."""
    start = 0
    for stop in range(1, len(experts) + 1):
        if stop == len(experts) or experts[stop] != experts[stop - 1] + 1:
            yield slice(experts[start], experts[stop - 1] + 1), slice(start, stop)
            start = stop
