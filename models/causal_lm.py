"""A decoder-only language model on one rank: embedding, layers, final norm, head.

T tokens, H hidden, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch

from ..common.errors import ModelLoadError
from ..kernels.expert_terms import sum_terms
from ..kernels.race import HeadScores, RaceRows
from .family_spec import FamilySpec, MoeSpec
from .forward_batch import ForwardBatch
from .layers.attention import Attention
from .layers.chain import build_chain
from .layers.decoder import DecoderLayer
from .layers.embedding import Embedding
from .layers.latent_attention import LatentAttention
from .layers.mlp import Mlp
from .layers.moe import SparseMlp
from .layers.norm import RmsNorm
from .layers.rotary import RotaryTable
from .layers.shared_experts import SharedExperts
from .layers.stack import run_layers
from .model_shape import ModelShape, MoeShape
from .weight_source import Placement, WeightSource


class CausalLM(torch.nn.Module):
    """Built with empty weights; build.load_model fills them.

    Attributes:
        config: the whole model's shape.
        data: the data ranks, where there are several.
        vocab: this rank's share of the vocabulary.
        num_kv_heads: kv heads of this rank: what its KV cache holds.
        device, dtype: where it computes, and the dtype of activations (weights may be stored in another).
        num_parameters, weight_bytes: of this rank.
        ignored_prefixes: of tensors that the checkpoint may hold though the model has no place for them.
    """

    def __init__(self, shape: ModelShape, spec: FamilySpec, *, checkpoint_names: Set[str], placement: Placement) -> None:
        super().__init__()
        if placement.parallel.whole_experts and shape.moe is None:
            raise ModelLoadError(
                f"{shape.architecture} has no sparse layers whose experts ranks could share: no expert_parallel or "
                "data_parallel; num_replicas runs several copies of it"
            )
        self.config = shape
        self.parallel, self.data = placement.parallel, placement.parallel.data
        self.device, self.dtype = placement.device, placement.compute_dtype
        self.embedding = Embedding(
            shape.vocab_size,
            shape.hidden_size,
            tied=shape.tied_embeddings,
            checkpoint_names=checkpoint_names,
            placement=placement,
        )
        self.vocab = self.embedding.vocab
        rotary = RotaryTable(shape.rotary, shape.max_position, device=placement.device)
        self.decoder_layers = [
            _build_layer(shape, spec, layer, rotary=rotary, checkpoint_names=checkpoint_names, placement=placement)
            for layer in range(shape.num_layers)
        ]
        self.layers = torch.nn.ModuleList(self.decoder_layers)  # the same objects, so that torch finds their parameters
        self.chain = build_chain(self.decoder_layers, placement.parallel, placement.device)
        self.final_norm = RmsNorm("norm", shape.hidden_size, eps=shape.norm_eps, placement=placement)
        self.num_kv_heads = self.decoder_layers[0].attention.num_kv_heads
        self.ignored_prefixes = tuple(_prefix(shape.num_layers + index) for index in range(shape.num_extra_layers))
        # A shared (tied) parameter comes once.
        self.num_parameters = sum(parameter.numel() for parameter in self.parameters())
        self.weight_bytes = sum(parameter.nbytes for parameter in self.parameters())

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """hidden [R, H] behind the final norm. Stores the batch's keys and values in its caches."""
        if self.data is not None:
            num_tokens = len(batch.token_ids_T)
            self.data.begin(batch.rank_tokens, num_tokens=num_tokens, is_padding_T=batch.is_padding_T)
        x_TH = self.embedding.embed(batch.token_ids_T)
        if self.chain is not None and self.chain.serves(len(x_TH)):
            addend, residual_TH = self.chain.run(x_TH, batch)
        else:
            addend, residual_TH = run_layers(self.decoder_layers, x_TH, batch, self.parallel)
        rows = batch.logits_rows_R
        if rows is not None:
            addend, residual_TH = sum_terms(addend).index_select(0, rows), residual_TH.index_select(0, rows)
        return self.final_norm.add_and_norm(addend, residual_TH)[0]

    def compute_logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """logits [R, V] float32, the whole vocabulary on every rank."""
        return self.gather_logits(self.compute_own_logits(hidden_RH))

    def compute_own_logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """logits float32 of this rank's share of the vocabulary (`vocab`)."""
        return self.embedding.own_logits(hidden_RH)

    def race_own(self, hidden_RH: torch.Tensor, rows: RaceRows) -> HeadScores:
        """What a draw reads of `compute_own_logits`; see kernels/head_race.py."""
        return self.embedding.race(hidden_RH, rows)

    def gather_logits(self, own_logits: torch.Tensor) -> torch.Tensor:
        """logits [R, V] of every rank's `compute_own_logits`."""
        return self.embedding.gather_logits(own_logits)

    def weight_sources(self) -> Iterator[WeightSource]:
        """Every checkpoint tensor that this rank needs, in the model's order."""
        yield from self.embedding.weight_sources()
        for index, layer in enumerate(self.decoder_layers):
            yield from layer.weight_sources(_prefix(index))
        yield from self.final_norm.weight_sources("model.")


def _build_layer(
    shape: ModelShape,
    spec: FamilySpec,
    layer: int,
    *,
    rotary: RotaryTable,
    checkpoint_names: Set[str],
    placement: Placement,
) -> DecoderLayer:
    mlp: Mlp | SparseMlp
    if spec.moe is not None and shape.moe is not None and layer in shape.moe.layers:
        mlp = _build_sparse(shape, shape.moe, spec.moe, layer, checkpoint_names=checkpoint_names, placement=placement)
    else:
        mlp = Mlp(shape, shape.intermediate_size, placement=placement)
    input_norm, post_attention_norm = (
        RmsNorm(name, shape.hidden_size, eps=shape.norm_eps, placement=placement)
        for name in ("input_layernorm", "post_attention_layernorm")
    )
    attention: Attention | LatentAttention
    if shape.latent is None:
        attention = Attention(shape, layer, rotary=rotary, placement=placement)
    else:
        attention = LatentAttention(shape, shape.latent, layer, rotary=rotary, placement=placement)
    return DecoderLayer(input_norm=input_norm, attention=attention, post_attention_norm=post_attention_norm, mlp=mlp)


def _build_sparse(
    shape: ModelShape, moe: MoeShape, spec: MoeSpec, layer: int, *, checkpoint_names: Set[str], placement: Placement
) -> SparseMlp:
    shared = None
    if spec.shared is not None:
        name, gate = spec.shared.name, spec.shared.gate
        shared = SharedExperts(shape, moe.shared_size, name=name, gate=gate, placement=placement)
    return SparseMlp(
        shape,
        moe,
        layouts=spec.layouts,
        checkpoint_names=checkpoint_names,
        prefix=_prefix(layer),
        placement=placement,
        correction=spec.correction,
        shared=shared,
    )


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."
