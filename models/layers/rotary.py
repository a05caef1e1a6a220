"""Rotary position tables: the frequencies of each scaling a checkpoint may name, and their cosines and sines.

With R rotary dimensions, dimension pair i turns by position * inv_freq[i], unscaled inv_freq[i] = theta^(-2i / R). Scalings
change inv_freq, and YaRN also multiplies cos and sin by an attention factor. Computed once at build, on the CPU in float32 so
that every device has the same tables.

P positions, C = R / 2. Sources: Su et al. 2021 (RoFormer); Chen et al. 2023 (linear); Peng et al. 2023 (YaRN); the Llama 3.1
release (llama3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..model_shape import RotaryShape


class RotaryTable:
    """cos and sin [P, C] float32 on `device`, shared by all layers."""

    def __init__(self, rotary: RotaryShape, max_position: int, *, device: torch.device) -> None:
        inv_freq_C, attention_factor = SCALINGS[rotary.scaling].frequencies(rotary)
        angle_PC = torch.arange(max_position, dtype=torch.float32).unsqueeze(1) * inv_freq_C
        self.cos_PC = (angle_PC.cos() * attention_factor).to(device)
        self.sin_PC = (angle_PC.sin() * attention_factor).to(device)


def _unscaled(rotary: RotaryShape) -> torch.Tensor:
    exponent_C = torch.arange(0, rotary.rotary_dim, 2, dtype=torch.float32) / rotary.rotary_dim
    return 1.0 / rotary.theta**exponent_C


def _default(rotary: RotaryShape) -> tuple[torch.Tensor, float]:
    return _unscaled(rotary), 1.0


def _linear(rotary: RotaryShape) -> tuple[torch.Tensor, float]:
    return _unscaled(rotary) / rotary.parameters["factor"], 1.0


def _llama3(rotary: RotaryShape) -> tuple[torch.Tensor, float]:
    """Long wavelengths are divided by the factor, short ones stay, those between are blended."""
    inv_freq_C = _unscaled(rotary)
    factor, low, high, original = (
        rotary.parameters[name]
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    turns_C = original * inv_freq_C / (2 * math.pi)  # full turns within the original context
    share_C = ((turns_C - low) / (high - low)).clamp(0, 1)
    return (1 - share_C) * inv_freq_C / factor + share_C * inv_freq_C, 1.0


def _yarn(rotary: RotaryShape) -> tuple[torch.Tensor, float]:
    """Dimensions that turn often keep their frequency, those that turn rarely are divided by the factor."""
    parameters, dim = rotary.parameters, rotary.rotary_dim
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        """The (fractional) dimension pair that makes so many turns within the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = dimension_of(parameters.get("beta_fast") or 32), dimension_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp_C = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    scaled_share_C = ramp_C.clamp(0, 1)
    inv_freq_C = _unscaled(rotary)
    scaled_C = inv_freq_C / factor * scaled_share_C + inv_freq_C * (1 - scaled_share_C)
    return scaled_C, _yarn_attention_factor(parameters)


def _yarn_attention_factor(parameters: Mapping[str, float]) -> float:
    factor = parameters["factor"]
    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return yarn_magnitude(factor, parameters["mscale"]) / yarn_magnitude(factor, parameters["mscale_all_dim"])
    return yarn_magnitude(factor, 1.0)


def yarn_magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """A kind of rotary scaling and the config parameters it reads."""

    frequencies: Callable[[RotaryShape], tuple[torch.Tensor, float]]
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


_ORIGINAL = "original_max_position_embeddings"
SCALINGS: Mapping[str, Scaling] = {
    "default": Scaling(frequencies=_default),
    "linear": Scaling(frequencies=_linear, required=frozenset({"factor"})),
    # Dynamic NTK changes nothing up to max_position_embeddings, which is as far as such a model is served.
    "dynamic": Scaling(frequencies=_default, required=frozenset({"factor"})),
    "llama3": Scaling(frequencies=_llama3, required=frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL})),
    "yarn": Scaling(
        frequencies=_yarn,
        required=frozenset({"factor", _ORIGINAL}),
        optional=frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
}
