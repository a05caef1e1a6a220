"""The experts that every token goes through beside the chosen ones: a gated MLP, which a sigmoid of its own may scale.

T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..model_shape import ModelShape
from ..parallel import whole
from ..weight_source import Placement, WeightSource
from .linear import column_linear
from .mlp import Mlp


class SharedExperts(torch.nn.Module):
    """A part of SparseMlp, which adds it to what the chosen experts give.

    Args:
        name: of the MLP, below the decoder layer.
        gate: of the weight whose product with a token, through a sigmoid, scales the MLP's output; None where there is none.
    """

    def __init__(self, shape: ModelShape, intermediate_size: int, *, name: str, gate: str | None, placement: Placement) -> None:
        super().__init__()
        self.mlp = Mlp(shape, intermediate_size, name=name, placement=placement)
        self.gate = None
        if gate is not None:
            self.gate = column_linear({gate: whole(1)}, shape.hidden_size, bias=False, placement=placement)

    def addend(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What this rank adds to the sum over ranks."""
        y_TH = self.mlp.forward(x_TH)
        return y_TH if self.gate is None else self.gate.forward(x_TH).sigmoid() * y_TH

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        yield from self.mlp.weight_sources(prefix)
        if self.gate is not None:
            yield from self.gate.weight_sources(prefix)
