"""RMSNorm with its weight, alone or fused with what comes before it: the sum over ranks and the addition of the residual."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.rms_norm import rms_norm
from ..parallel import Addend
from ..weight_source import Placement, WeightSource


class RmsNorm(torch.nn.Module):
    """Of the last dimension; every rank keeps the whole weight."""

    def __init__(self, name: str, size: int, *, eps: float, placement: Placement) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.parallel = placement.parallel
        self.weight = placement.vector(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add_and_norm(self, x_TH: Addend, residual_TH: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(s), s), where s is the residual and every rank's addend x; without a residual s is x, whole on each rank."""
        if residual_TH is None:
            assert isinstance(x_TH, torch.Tensor)
            return rms_norm(x_TH, self.weight, self.eps), x_TH
        return self.parallel.sum_and_norm(x_TH, residual_TH, self.weight, self.eps)

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        size = self.weight.shape[0]
        yield WeightSource(name=f"{prefix}{self.name}.weight", shape=(size,), region=(slice(size),), target=self.weight)
