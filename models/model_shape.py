"""The numbers that define a decoder, whatever its family: what the layers are built from and what the engine asks about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..kernels.clamped_gate import ClampedGate
from ..kernels.expert_scoring import ExpertScoring


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryShape:
    """Rotary embedding: `scaling` is a key of layers.rotary.SCALINGS, `parameters` its numbers."""

    theta: float
    rotary_dim: int
    scaling: str
    parameters: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeShape:
    """The mixture-of-experts layers.

    Attributes:
        layers: which layers are sparse; the others have a plain MLP.
        renormalize: the chosen experts' weights are divided by their sum.
        scoring: how experts are chosen; None is by softmax alone.
        shared_size: intermediate size of the MLP that every token goes through besides; 0 where there is none.
        bias: the router and the experts have biases.
        clamped_gate: of the experts, instead of the model's activation.
    """

    layers: frozenset[int]
    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    scoring: ExpertScoring | None = None
    shared_size: int = 0
    bias: bool = False
    clamped_gate: ClampedGate | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentShape:
    """Latent attention: what is cached of a token are `kv_rank` numbers and `turning_dim` more that turn with its position.

    Attributes:
        q_rank: numbers that all heads' queries are made from; None where they are made from the hidden state.
        still_dim, turning_dim: numbers of a head's query and key that do not turn with the position, and that do.
        value_dim: numbers of a head's value.
        interleaved: numbers that turn together lie side by side in the checkpoint, not half a head apart.
        scale: of attention scores.
    """

    kv_rank: int
    q_rank: int | None
    still_dim: int
    turning_dim: int
    value_dim: int
    interleaved: bool
    scale: float

    @property
    def cached_dim(self) -> int:
        return self.kv_rank + self.turning_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes are the whole model's, not a rank's.

    Attributes:
        architecture: as config.json names it.
        num_kv_heads, head_dim: as cached: with latent attention one head, whose values are the first numbers of its keys.
        max_position: positions the model has: the longest sequence.
        windows: a layer's sliding window in tokens; None sees everything.
        output_bias: of the attention's output projection.
        moe: None for a dense model.
        sinks: each head's softmax has one term more, a number of the checkpoint's.
        latent: None for attention with keys and values of its own for each kv head.
        num_extra_layers: that the checkpoint may hold behind these and that are not loaded.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    attention_soft_cap: float | None
    tied_embeddings: bool
    rotary: RotaryShape
    windows: tuple[int | None, ...]
    moe: MoeShape | None
    sinks: bool = False
    latent: LatentShape | None = None
    num_extra_layers: int = 0
