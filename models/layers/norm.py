"""RMSNorm with its weight, alone or fused with the residual addition before it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.rms_norm import rms_norm
from ..weight_source import Placement, WeightSource


class RmsNorm(torch.nn.Module):
    """Of the last dimension; every rank keeps the whole weight."""

    def __init__(self, name: str, size: int, *, eps: float, placement: Placement) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.weight = placement.vector(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add_and_norm(self, x_TH: torch.Tensor, residual_TH: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); without a residual x is the first one."""
        if residual_TH is None:
            return rms_norm(x_TH, self.weight, self.eps), x_TH
        return rms_norm(x_TH, self.weight, self.eps, residual_TH=residual_TH)

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        size = self.weight.shape[0]
        yield WeightSource(name=f"{prefix}{self.name}.weight", shape=(size,), region=(slice(size),), target=self.weight)
