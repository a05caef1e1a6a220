"""Gated activation of an MLP: y = activation(gate) * up.

The last dimension of `gate_up` holds the gate in its first half and up in its second. float32 arithmetic, one rounding
to the dtype of `gate_up`. T tokens, F intermediate, U = 2 F.

    silu(g)      = g / (1 + exp(-g))
    gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3)))

Source: Shazeer 2020, "GLU Variants Improve Transformer"; Hendrycks and Gimpel 2016 for the tanh form of GELU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cpu import ops as cpu_ops
from .dispatch import choose_backend

ACTIVATIONS = ("silu", "gelu_tanh")
# Largest |y - reference| for inputs of order one: (relative, absolute).
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1.6e-2, 8e-3)}


def gated_activation(gate_up_TU: torch.Tensor, activation: str) -> torch.Tensor:
    """y [T, F], contiguous. `activation` is one of ACTIVATIONS; ValueError where it is not or shapes do not fit."""
    check_activation(activation)
    if gate_up_TU.dim() != 2 or gate_up_TU.shape[1] % 2:
        raise ValueError(f"gated_activation: gate_up {tuple(gate_up_TU.shape)} must be [tokens, 2 * intermediate]")
    backend = choose_backend("gated_activation", gate_up_TU)
    if backend == "cpp":
        return cpu_ops.gated_activation(gate_up_TU, activation)
    return gated_activation_ref(gate_up_TU, activation)


def check_activation(activation: str) -> None:
    """ValueError where `activation` is not one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not known: use one of {', '.join(ACTIVATIONS)}")


def gated_activation_ref(gate_up_TU: torch.Tensor, activation: str) -> torch.Tensor:
    gate_TF, up_TF = gate_up_TU.float().chunk(2, dim=-1)
    gated_TF = F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate="tanh")
    return (gated_TF * up_TF).to(gate_up_TU.dtype)
