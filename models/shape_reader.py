"""Turns a checkpoint's config into the ModelShape that the layers are built from, by its family's spec."""

from __future__ import annotations

from typing import Any

from .config_reader import ConfigReader
from .family_spec import FamilySpec, Field, LatentSpec, MoeSpec
from .layers.rotary import SCALINGS, yarn_magnitude
from .model_shape import LatentShape, ModelShape, MoeShape, RotaryShape

# config.json's names for the activations that kernels have.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def read_shape(reader: ConfigReader, spec: FamilySpec, *, architecture: str) -> ModelShape:
    """The checkpoint's shape.

    Raises:
        ModelLoadError: a field is missing, contradicts another, or has an effect that is not supported.
    """
    if (model_type := reader.get("model_type")) != spec.model_type:
        raise reader.error(f"{architecture} goes with model_type {spec.model_type!r}, not {model_type!r}")
    num_layers, hidden_size = reader.size("num_hidden_layers"), reader.size("hidden_size")
    num_heads = reader.size("num_attention_heads")
    num_kv_heads = reader.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise reader.error(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    head_dim = reader.size("head_dim", hidden_size // num_heads)  # with latent attention, of what turns
    rotary, max_position = _read_rotary(reader, head_dim, partial=spec.partial_rotary)
    latent = None
    if spec.latent is not None:
        latent = _read_latent(reader, spec.latent, rotary)
        if num_kv_heads != num_heads:
            raise reader.error(f"num_key_value_heads {num_kv_heads} is not num_attention_heads {num_heads}")
        num_kv_heads, head_dim = 1, latent.cached_dim
    soft_cap = _value(reader, spec.attention_soft_cap)
    shape = ModelShape(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=reader.size("vocab_size"),
        max_position=max_position,
        norm_eps=float(reader.get("rms_norm_eps")),
        activation=_read_activation(reader),
        qkv_bias=bool(_value(reader, spec.qkv_bias)),
        output_bias=bool(_value(reader, spec.output_bias)),
        mlp_bias=bool(_value(reader, spec.mlp_bias)),
        qk_norm=bool(_value(reader, spec.qk_norm)),
        attention_soft_cap=None if soft_cap is None else float(soft_cap),
        tied_embeddings=bool(reader.get("tie_word_embeddings")),
        rotary=rotary,
        windows=spec.windows(reader, num_layers) if spec.windows else (None,) * num_layers,
        moe=_read_moe(reader, spec.moe, num_layers),
        sinks=spec.sinks,
        latent=latent,
        num_extra_layers=_value(reader, spec.extra_layers) or 0,
    )
    reader.check_all_read()
    return shape


def _value(reader: ConfigReader, setting: Field | bool | None) -> Any:
    return reader.get(setting.name) if isinstance(setting, Field) else setting


def _read_activation(reader: ConfigReader) -> str:
    name = reader.get("hidden_act")
    if name not in _ACTIVATIONS:
        raise reader.error(f"hidden_act {name!r} is not supported: known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _read_moe(reader: ConfigReader, spec: MoeSpec | None, num_layers: int) -> MoeShape | None:
    if spec is None:
        return None
    moe = MoeShape(
        layers=spec.layers(reader, num_layers) if spec.layers else frozenset(range(num_layers)),
        num_experts=reader.size(spec.num_experts.name),
        top_k=reader.size("num_experts_per_tok"),
        intermediate_size=reader.size(spec.intermediate_size.name),
        renormalize=bool(_value(reader, spec.renormalize)),
        scoring=spec.scoring(reader) if spec.scoring else None,
        shared_size=spec.shared.intermediate_size(reader) if spec.shared else 0,
        bias=spec.bias,
        clamped_gate=spec.clamped_gate(reader) if spec.clamped_gate else None,
    )
    if moe.top_k > moe.num_experts:
        raise reader.error(f"num_experts_per_tok {moe.top_k} is more than the {moe.num_experts} experts")
    problem = moe.scoring.problem(moe.num_experts, moe.top_k) if moe.scoring else None
    if problem is not None:
        raise reader.error(problem)
    return moe


def _read_latent(reader: ConfigReader, spec: LatentSpec, rotary: RotaryShape) -> LatentShape:
    still_dim, turning_dim = reader.size("qk_nope_head_dim"), reader.size("qk_rope_head_dim")
    if turning_dim != rotary.rotary_dim:
        raise reader.error(f"head_dim {rotary.rotary_dim} is not qk_rope_head_dim {turning_dim}")
    scale = (still_dim + turning_dim) ** -0.5
    if rotary.parameters.get("mscale_all_dim"):
        # YaRN's attention factor is here on the scores, not on cos and sin alone, which leave out what does not turn.
        scale *= yarn_magnitude(rotary.parameters["factor"], rotary.parameters["mscale_all_dim"]) ** 2
    return LatentShape(
        kv_rank=reader.size("kv_lora_rank"),
        q_rank=reader.size("q_lora_rank") if reader.get("q_lora_rank") is not None else None,
        still_dim=still_dim,
        turning_dim=turning_dim,
        value_dim=reader.size("v_head_dim"),
        interleaved=bool(_value(reader, spec.interleaved)),
        scale=scale,
    )


def _read_rotary(reader: ConfigReader, head_dim: int, *, partial: bool) -> tuple[RotaryShape, int]:
    """The rotary embedding, and how many positions the model has with it.

    transformers has put the older layout (rope_theta beside rope_scaling) into `rope_parameters` already.
    """
    parameters = dict(reader.get("rope_parameters", {}))
    scaling = parameters.pop("rope_type", "default")
    parameters.pop("type", None)
    theta = parameters.pop("rope_theta", None)
    rotary_part = parameters.pop("partial_rotary_factor", 1.0)
    if rotary_part != 1.0 and not partial:
        raise reader.error("partial_rotary_factor other than 1 is not supported by this architecture")
    rotary_dim = int(head_dim * rotary_part)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise reader.error(f"{rotary_dim} of a head's {head_dim} numbers cannot turn in pairs")
    if scaling not in SCALINGS:
        raise reader.error(f"rope_type {scaling!r} is not supported: known are {', '.join(SCALINGS)}")
    kind = SCALINGS[scaling]
    parameters = {name: value for name, value in parameters.items() if value is not None}
    unknown, missing = set(parameters) - kind.required - kind.optional, kind.required - set(parameters)
    if unknown or missing:
        problem = f"does not know {', '.join(sorted(unknown))}" if unknown else f"needs {', '.join(sorted(missing))}"
        raise reader.error(f"rope_type {scaling!r} {problem}")
    for name, value in {"rope_theta": theta, **parameters}.items():
        if not isinstance(value, int | float) or (name == "rope_theta" and value <= 0):
            raise reader.error(f"rope parameter {name} must be a number, rope_theta above 0, not {value!r}")
    max_position = reader.size("max_position_embeddings")
    if scaling == "yarn":
        # Such configs often keep max_position_embeddings at the length before the scaling.
        max_position = max(max_position, int(parameters["factor"] * parameters["original_max_position_embeddings"]))
    return RotaryShape(theta=float(theta), rotary_dim=rotary_dim, scaling=scaling, parameters=parameters), max_position
