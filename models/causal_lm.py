"""A decoder-only language model on one rank: embedding, layers, final norm, head.

T tokens, H hidden, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch

from .family_spec import FamilySpec
from .forward_batch import ForwardBatch
from .layers.attention import Attention
from .layers.decoder import DecoderLayer
from .layers.embedding import Embedding
from .layers.mlp import Mlp
from .layers.moe import SparseMlp
from .layers.norm import RmsNorm
from .layers.rotary import RotaryTable
from .model_shape import ModelShape
from .weight_source import Placement, WeightSource


class CausalLM(torch.nn.Module):
    """Built with empty weights; build.load_model fills them.

    Attributes:
        config: the whole model's shape.
        num_kv_heads: kv heads of this rank: what its KV cache holds.
        device, dtype: where it computes, and the dtype of activations (weights may be stored in another).
        num_parameters, weight_bytes: of this rank.
    """

    def __init__(self, shape: ModelShape, spec: FamilySpec, *, checkpoint_names: Set[str], placement: Placement) -> None:
        super().__init__()
        self.config = shape
        self.device, self.dtype = placement.device, placement.compute_dtype
        rotary = RotaryTable(shape.rotary, shape.max_position, device=placement.device)
        self.embedding = Embedding(
            shape.vocab_size,
            shape.hidden_size,
            tied=shape.tied_embeddings,
            checkpoint_names=checkpoint_names,
            placement=placement,
        )
        self.layers = torch.nn.ModuleList()
        for layer in range(shape.num_layers):
            attention = Attention(shape, layer, rotary=rotary, placement=placement)
            mlp: Mlp | SparseMlp
            if spec.moe is not None and shape.moe is not None and layer in shape.moe.layers:
                mlp = SparseMlp(
                    shape,
                    shape.moe,
                    layouts=spec.moe.layouts,
                    checkpoint_names=checkpoint_names,
                    prefix=_prefix(layer),
                    placement=placement,
                )
            else:
                mlp = Mlp(shape, placement=placement)
            self.layers.append(
                DecoderLayer(
                    input_norm=self._norm("input_layernorm", placement),
                    attention=attention,
                    post_attention_norm=self._norm("post_attention_layernorm", placement),
                    mlp=mlp,
                )
            )
        self.num_kv_heads = attention.num_kv_heads
        self.final_norm = self._norm("norm", placement)
        # nn.Module yields a shared (tied) parameter once.
        self.num_parameters = sum(parameter.numel() for parameter in self.parameters())
        self.weight_bytes = sum(parameter.nbytes for parameter in self.parameters())

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """hidden [R, H] behind the final norm. Stores the batch's keys and values in its caches."""
        x_TH = self.embedding.embed(batch.token_ids_T)
        residual_TH = None
        for layer in self.layers:
            x_TH, residual_TH = layer(x_TH, residual_TH, batch)
        rows = batch.logits_rows_R
        return self.final_norm.add_and_norm(x_TH[rows], residual_TH[rows])[0]

    def compute_logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """logits [R, V] float32, the whole vocabulary on every rank."""
        return self.embedding.logits(hidden_RH)

    def weight_sources(self) -> Iterator[WeightSource]:
        """Every checkpoint tensor that this rank needs, in the model's order."""
        yield from self.embedding.weight_sources()
        for index, layer in enumerate(self.layers):
            yield from layer.weight_sources(_prefix(index))
        yield from self.final_norm.weight_sources("model.")

    def _norm(self, name: str, placement: Placement) -> RmsNorm:
        return RmsNorm(name, self.config.hidden_size, eps=self.config.norm_eps, placement=placement)


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."
