"""What a family of checkpoints is, as data: which fields of its config.json mean what, and how its tensors are named.

A family file is one FamilySpec, written as its differences from Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..kernels.clamped_gate import ClampedGate
from ..kernels.expert_scoring import ExpertScoring
from .config_reader import ConfigReader
from .layers.expert_weights import ExpertNames

# From the config and the number of layers: one entry a layer, None for a layer that sees everything.
WindowRule = Callable[[ConfigReader, int], tuple[int | None, ...]]
# Likewise: the layers that are sparse.
SparseRule = Callable[[ConfigReader, int], frozenset[int]]


@dataclass(frozen=True, slots=True)
class Field:
    """Stands for the value of this field of config.json."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedExpertsSpec:
    """An MLP that every token of a sparse layer goes through. `name` and `gate` as in layers.shared_experts."""

    intermediate_size: Callable[[ConfigReader], int]
    name: str
    gate: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeSpec:
    """The sparse layers.

    Attributes:
        layers: which layers are sparse; None is all of them.
        renormalize: the chosen experts' weights are divided by their sum.
        layouts: the namings of the experts' tensors that a checkpoint may use, the usual one first.
        scoring: how experts are chosen; None is by softmax alone.
        correction: the checkpoint's name of the correction of scores, below the decoder layer.
        shared: beside the chosen experts; None where the family has none.
        bias: the router and the experts have biases.
        clamped_gate: of the experts; None is the model's activation.
    """

    num_experts: Field
    intermediate_size: Field
    renormalize: Field | bool
    layouts: tuple[ExpertNames, ...]
    layers: SparseRule | None = None
    scoring: Callable[[ConfigReader], ExpertScoring] | None = None
    correction: str | None = None
    shared: SharedExpertsSpec | None = None
    bias: bool = False
    clamped_gate: Callable[[ConfigReader], ClampedGate] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpec:
    """Multi-head latent attention.

    Attributes:
        interleaved: numbers that turn together lie side by side in the checkpoint, not half a head apart.
    """

    interleaved: Field | bool


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilySpec:
    """A decoder of Llama's structure with these settings.

    Attributes:
        model_type: of config.json.
        qkv_bias, output_bias, mlp_bias: biases of the query/key/value, attention output and MLP projections.
        qk_norm: queries and keys are normed by head before the rotary embedding.
        windows: each layer's sliding window; None where the family has none.
        attention_soft_cap: attention scores become cap * tanh(score / cap).
        sinks: each head's softmax has one term more, a number of the checkpoint's.
        latent: None for attention with keys and values of its own for each kv head.
        partial_rotary: the rope parameter partial_rotary_factor is followed: only so much of a head turns.
        extra_layers: layers that a checkpoint may hold behind the model's own, such as those that predict further tokens;
            they are not loaded.
    """

    model_type: str
    qkv_bias: Field | bool
    output_bias: Field | bool
    mlp_bias: Field | bool
    qk_norm: Field | bool
    windows: WindowRule | None = None
    attention_soft_cap: Field | None = None
    sinks: bool = False
    latent: LatentSpec | None = None
    partial_rotary: bool = False
    extra_layers: Field | None = None
    moe: MoeSpec | None = None


def same_window(reader: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    """Every layer has `sliding_window`, if the config gives one."""
    window = _window(reader)
    if window is not None and "full_attention" in reader.get("layer_types", ()):
        # transformers slides every layer of these families, whoever wrote the config meant something else.
        raise reader.error("layer_types is not supported by this architecture, whose layers all have sliding_window")
    return (window,) * num_layers


def window_by_layer_type(reader: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    """`layer_types` says which layers slide."""
    layer_types = reader.get("layer_types", ())
    slides = "sliding_attention" in layer_types
    window = _window(reader) if slides else reader.get("sliding_window")  # may be 0 where nothing slides
    assert len(layer_types) == num_layers  # checked by transformers
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise reader.error(f"layer_types holds {', '.join(sorted(unknown))}: only full_attention and sliding_attention work")
    if slides and window is None:
        raise reader.error("layer_types holds sliding_attention, but sliding_window is not set")
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _window(reader: ConfigReader) -> int | None:
    return reader.size("sliding_window") if reader.get("sliding_window") is not None else None
