"""One decoder layer: norm, attention, norm, MLP, with the residual stream carried beside the activations.

Attention and MLP give what this rank adds to the sum over ranks; the norm behind them sums and adds in one op.

T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..forward_batch import ForwardBatch
from ..parallel import Addend
from ..weight_source import WeightSource
from .attention import Attention
from .latent_attention import LatentAttention
from .mlp import Mlp
from .moe import SparseMlp
from .norm import RmsNorm


class DecoderLayer(torch.nn.Module):
    def __init__(
        self,
        *,
        input_norm: RmsNorm,
        attention: Attention | LatentAttention,
        post_attention_norm: RmsNorm,
        mlp: Mlp | SparseMlp,
    ) -> None:
        super().__init__()
        self.input_norm = input_norm
        self.attention = attention
        self.post_attention_norm = post_attention_norm
        self.mlp = mlp

    def attend(self, x_TH: Addend, residual_TH: torch.Tensor | None, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The first half: (this rank's addend, residual), which the next norm adds.

        Before the first layer there is no residual: x is whole.
        """
        x_TH, residual_TH = self.input_norm.add_and_norm(x_TH, residual_TH)
        return self.attention.forward(x_TH, batch), residual_TH

    def feed_forward(self, x_TH: Addend, residual_TH: torch.Tensor | None) -> tuple[Addend, torch.Tensor]:
        """The second half, of what `attend` answers: the same for the next layer."""
        if isinstance(self.mlp, SparseMlp):
            x_TH, residual_TH, chosen = self.mlp.norm_and_choose(self.post_attention_norm, x_TH, residual_TH)
            return self.mlp(x_TH, chosen), residual_TH
        x_TH, residual_TH = self.post_attention_norm.add_and_norm(x_TH, residual_TH)
        return self.mlp(x_TH), residual_TH

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        yield from self.input_norm.weight_sources(prefix)
        yield from self.attention.weight_sources(f"{prefix}self_attn.")
        yield from self.post_attention_norm.weight_sources(prefix)
        yield from self.mlp.weight_sources(prefix)
