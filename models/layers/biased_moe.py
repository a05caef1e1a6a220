"""Mixture of experts with biases and a clamped gate, as gpt-oss has them, behind a router with a bias.

T tokens, H hidden, E experts, F intermediate of this rank. Ranks share every expert's intermediate dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...common.errors import ModelLoadError
from ...kernels.biased_moe_mlp import biased_moe_mlp
from ...kernels.dispatch import kernel_mode
from ...kernels.moe_routing import route_tokens
from ..model_shape import ClampedGate, ModelShape, MoeShape
from ..parallel import whole
from ..weight_source import Placement, WeightSource
from .linear import column_linear
from .moe import ExpertNames


class BiasedSparseMlp(torch.nn.Module):
    """Stands where a dense layer has its Mlp.

    Args:
        names: of one tensor for all experts. They are stored as inputs x outputs, gate and up column by column, and biases have
            "_bias" behind the name.

    Raises:
        ModelLoadError: on CUDA, where no kernel serves such experts yet.
    """

    def __init__(
        self, shape: ModelShape, moe: MoeShape, gate: ClampedGate, *, names: ExpertNames, placement: Placement
    ) -> None:
        super().__init__()
        if placement.device.type == "cuda" and kernel_mode() != "ref":
            raise ModelLoadError(f"{shape.architecture} runs on a CPU only: no CUDA kernel has experts with biases yet")
        if placement.parallel.whole_experts:
            raise ModelLoadError(f"{shape.architecture} does not run with expert_parallel yet: ranks share each of its experts")
        self.moe, self.gate, self.names, self.parallel = moe, gate, names, placement.parallel
        self.intermediate = self.parallel.share(moe.intermediate_size, what="the experts' intermediate size")
        num_experts, hidden, size = moe.num_experts, shape.hidden_size, self.intermediate.size
        self.router = column_linear({names.router: whole(num_experts)}, hidden, bias=True, placement=placement)
        self.gate_up_weight = placement.matrix(num_experts, 2 * size, hidden)
        self.gate_up_bias = placement.bias(num_experts, 2 * size)
        self.down_weight = placement.matrix(num_experts, hidden, size)
        self.down_bias = placement.bias(num_experts, hidden)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What this rank adds to the sum over ranks."""
        weights_TC, experts_TC = route_tokens(self.router.forward(x_TH), self.moe.top_k, renormalize=self.moe.renormalize)
        return biased_moe_mlp(
            x_TH,
            self.gate_up_weight,
            self.gate_up_bias,
            self.down_weight,
            self.down_bias if self.parallel.rank == 0 else None,  # it belongs to the sum, so one rank alone adds it
            weights_TC,
            experts_TC,
            alpha=self.gate.alpha,
            limit=self.gate.limit,
        )

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        yield from self.router.weight_sources(prefix)
        (num_experts, hidden, size), rows, every = self.down_weight.shape, self.intermediate, slice(None)
        for parity, half in ((0, slice(size)), (1, slice(size, None))):
            columns = slice(2 * rows.start + parity, 2 * rows.stop, 2)
            yield WeightSource(
                name=prefix + self.names.gate,
                shape=(num_experts, hidden, 2 * rows.total),
                region=(every, every, columns),
                target=self.gate_up_weight[:, half].transpose(1, 2),
            )
            yield WeightSource(
                name=f"{prefix}{self.names.gate}_bias",
                shape=(num_experts, 2 * rows.total),
                region=(every, columns),
                target=self.gate_up_bias[:, half],
            )
        yield WeightSource(
            name=prefix + self.names.down,
            shape=(num_experts, rows.total, hidden),
            region=(every, rows.range, every),
            target=self.down_weight.transpose(1, 2),
        )
        yield WeightSource(
            name=f"{prefix}{self.names.down}_bias",
            shape=(num_experts, hidden),
            region=(every, every),
            target=self.down_bias,
        )
