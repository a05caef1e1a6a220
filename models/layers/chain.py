"""Steps of very few tokens: a layer is its attention and one kernel for all that lies between two attentions.

It serves layers of a plain kind on a single rank (between_attentions.py says which), where the tuned table has it faster.

T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.between_attentions import (
    SOURCE,
    LayerWeights,
    Next,
    Router,
    choose_config,
    fused_layer,
    new_counter,
    unfit_reason,
)
from ...kernels.cuda import loader
from ...kernels.expert_terms import Summands
from ..forward_batch import ForwardBatch
from ..parallel import Parallel
from .attention import Attention
from .decoder import DecoderLayer
from .linear import Linear
from .moe import SparseMlp


class LayerChain:
    """All layers of a model, and where the kernels' CTAs meet: calls of one chain follow each other on one stream."""

    def __init__(self, layers: Sequence[DecoderLayer], device: torch.device) -> None:
        self._attentions = [layer.attention for layer in layers if isinstance(layer.attention, Attention)]
        self._first = layers[0]
        self._weights = [_weights_of(layer) for layer in layers]
        self._following = [Next(layer.input_norm.weight, layer.input_norm.eps, _qkv(layer).weight) for layer in layers[1:]]
        self._counter = new_counter(device)

    def serves(self, num_tokens: int) -> bool:
        """Whether one kernel is faster for every layer, and can run."""
        for weights, following in zip(self._weights, self._following, strict=False):
            if choose_config(weights, following, num_tokens) is None:
                return False
            if not loader.is_served(SOURCE, unfit_reason(num_tokens, weights, following), instead="a kernel for each op"):
                return False
        return True

    def run(self, x_TH: torch.Tensor, batch: ForwardBatch) -> tuple[Summands, torch.Tensor]:
        """(addend, residual) of the last layer, for tokens that it `serves`."""
        y_TH, residual_TH = self._first.input_norm.add_and_norm(x_TH, None)
        qkv_TX = self._attentions[0].qkv_proj.forward(y_TH)
        following = [*self._following, None]
        for attention, weights, after in zip(self._attentions, self._weights, following, strict=True):
            attended = attention.attend(qkv_TX, batch)
            config = choose_config(weights, after or self._following[-1], len(x_TH))
            assert config is not None
            qkv_TX, residual_TH = fused_layer(attended, residual_TH, weights, after, counter=self._counter, config=config)
        return qkv_TX, residual_TH


def build_chain(layers: Sequence[DecoderLayer], parallel: Parallel, device: torch.device) -> LayerChain | None:
    """None on several ranks, without a GPU, for a single layer, or where a layer has what the kernel does not know."""
    is_alone = parallel.size == 1 and parallel.data is None and not parallel.whole_experts
    if device.type != "cuda" or not is_alone or len(layers) < 2 or not all(map(_is_plain, layers)):
        return None
    return LayerChain(layers, device)


def _is_plain(layer: DecoderLayer) -> bool:
    if not isinstance(layer.attention, Attention):
        return False
    linears: list[Linear] = [layer.attention.qkv_proj, layer.attention.o_proj]
    if isinstance(layer.mlp, SparseMlp):
        sparse = layer.mlp
        if sparse.choice is not None or sparse.shared is not None or not isinstance(sparse.experts.activation, str):
            return False
        if sparse.experts.gate_up_bias is not None or sparse.experts.down_bias is not None:
            return False
        linears.append(sparse.router)
    else:
        linears += [layer.mlp.gate_up_proj, layer.mlp.down_proj]
    return all(linear.bias is None for linear in linears)


def _weights_of(layer: DecoderLayer) -> LayerWeights:
    assert isinstance(layer.attention, Attention)
    router = None
    if isinstance(layer.mlp, SparseMlp):
        sparse = layer.mlp
        router = Router(sparse.router.weight, sparse.moe.top_k, sparse.moe.renormalize)
        gate_up_EUH, down_EHF, activation = sparse.experts.gate_up_weight, sparse.experts.down_weight, sparse.experts.activation
        assert isinstance(activation, str)
    else:
        gate_up_EUH, down_EHF = layer.mlp.gate_up_proj.weight[None], layer.mlp.down_proj.weight[None]
        activation = layer.mlp.activation
    norm = layer.post_attention_norm
    return LayerWeights(
        output_HQ=layer.attention.o_proj.weight,
        norm_H=norm.weight,
        eps=norm.eps,
        gate_up_EUH=gate_up_EUH,
        down_EHF=down_EHF,
        activation=activation,
        router=router,
    )


def _qkv(layer: DecoderLayer) -> Linear:
    assert isinstance(layer.attention, Attention)
    return layer.attention.qkv_proj
