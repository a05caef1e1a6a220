"""Gated MLP: packed gate and up, activation, down."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.gated_linear import gated_linear
from ..model_shape import ModelShape
from ..parallel import ALIGNED
from ..weight_source import Placement, WeightSource
from .linear import column_linear, row_linear


class Mlp(torch.nn.Module):
    """Ranks share the intermediate dimension. `name` is the checkpoint's, below the decoder layer."""

    def __init__(self, shape: ModelShape, intermediate_size: int, *, name: str = "mlp", placement: Placement) -> None:
        super().__init__()
        rows = placement.parallel.share(intermediate_size, what="the intermediate size", multiple=ALIGNED)
        self.name = name
        self.activation = shape.activation
        self.gate_up_proj = column_linear(
            {"gate_proj": rows, "up_proj": rows}, shape.hidden_size, bias=shape.mlp_bias, placement=placement
        )
        self.down_proj = row_linear("down_proj", shape.hidden_size, rows, bias=shape.mlp_bias, placement=placement)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What this rank adds to the sum over ranks."""
        gate_up = self.gate_up_proj
        return self.down_proj.forward(gated_linear(x_TH, gate_up.weight, gate_up.bias, activation=self.activation))

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        yield from self.gate_up_proj.weight_sources(f"{prefix}{self.name}.")
        yield from self.down_proj.weight_sources(f"{prefix}{self.name}.")
