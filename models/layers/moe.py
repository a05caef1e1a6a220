"""Mixture-of-experts MLP: router x dispatcher x grouped GEMM.

The router chooses each token's experts, the map says in which slots their weights lie (expert_map.py), the dispatcher brings
tokens and slots together (expert_dispatch.py), and one grouped op computes the gated MLPs of this rank's slots
(expert_weights.py).

T tokens, H hidden, C choices. Ranks share every expert's intermediate size, or the slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch

from ...kernels.expert_terms import sum_terms
from ...kernels.linear import linear
from ...kernels.moe_routing import route_tokens
from ...kernels.norm_and_route import norm_and_route
from ..model_shape import ModelShape, MoeShape
from ..parallel import Addend, whole
from ..weight_source import Placement, WeightSource
from .expert_choice import ExpertChoice
from .expert_dispatch import choose_dispatcher
from .expert_map import build_map
from .expert_weights import ExpertNames, ExpertWeights
from .linear import column_linear
from .norm import RmsNorm
from .shared_experts import SharedExperts

Chosen = tuple[torch.Tensor, torch.Tensor]  # each token's weights [T, C] and experts [T, C]


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
        names = next((names for names in layouts if prefix + names.down.format(expert=0) in checkpoint_names), layouts[0])
        self.moe = moe
        self.choice = None
        if moe.scoring is not None and not (moe.scoring.is_plain and correction is None):
            self.choice = ExpertChoice(moe, moe.scoring, correction=correction, placement=placement)
        self.shared = shared
        self.parallel = placement.parallel
        self.map = build_map(moe.num_experts, placement.parallel, device=placement.device)
        self.slots, intermediate = self.parallel.expert_shares(self.map.num_slots, moe.intermediate_size)
        self.dispatcher = choose_dispatcher(self.parallel, self.slots, device=placement.device)
        self.router = column_linear(
            {names.router: whole(moe.num_experts)}, shape.hidden_size, bias=moe.bias, placement=placement
        )
        self.experts = ExpertWeights(
            names,
            num_experts=moe.num_experts,
            hidden_size=shape.hidden_size,
            activation=moe.clamped_gate or shape.activation,
            slots=self.slots,
            intermediate=intermediate,
            bias=moe.bias,
            placement=placement,
        )

    def norm_and_choose(
        self, norm: RmsNorm, x_TH: Addend, residual_TH: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Chosen | None]:
        """(norm(s), s, what `forward` takes beside the first), where s is the residual and every rank's addend x.

        One op where the choice is a plain one and x is whole on each rank.
        """
        is_plain = self.choice is None and self.router.bias is None
        if not is_plain or residual_TH is None or not isinstance(x_TH, torch.Tensor) or norm.parallel.size > 1:
            return *norm.add_and_norm(x_TH, residual_TH), None
        y_TH, sum_TH, weights_TC, experts_TC = norm_and_route(
            x_TH, residual_TH, norm.weight, norm.eps, self.router.weight, self.moe.top_k, renormalize=self.moe.renormalize
        )
        return y_TH, sum_TH, (weights_TC, experts_TC)

    def forward(self, x_TH: torch.Tensor, chosen: Chosen | None = None) -> Addend:
        """What this rank adds to the sum over ranks. `chosen`: what `choose` answers for x, where that is known."""
        weights_TC, experts_TC = self.choose(x_TH) if chosen is None else chosen
        out = self.dispatcher.run(x_TH, weights_TC, self.map.slots(experts_TC), self.experts.run)
        return out if self.shared is None else sum_terms(out) + self.shared.addend(x_TH)

    def choose(self, x_TH: torch.Tensor) -> Chosen:
        """Each token's weights [T, C] and experts [T, C]."""
        if self.choice is None:
            return route_tokens(self.router.forward(x_TH), self.moe.top_k, renormalize=self.moe.renormalize)
        return self.choice.choose(linear(x_TH, self.router.weight, self.router.bias, out_dtype=torch.float32))

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        yield from self.router.weight_sources(prefix)
        if self.choice is not None:
            yield from self.choice.weight_sources(prefix)
        yield from self.experts.weight_sources(prefix, self.map.experts_in(self.slots))
        if self.shared is not None:
            yield from self.shared.weight_sources(prefix)
