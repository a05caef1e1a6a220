"""Gated activation of an MLP: y = activation(gate) * up.

The last dimension of `gate_up` holds the gate in its first half and up in its second. float32 arithmetic, one rounding
to the dtype of `gate_up`. T tokens, F intermediate, U = 2 F.

    silu(g)      = g / (1 + exp(-g))
    gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3)))

The experts of gpt-oss have a clamped gate instead, which only moe_mlp.py serves: see ClampedGate.

Sources: Shazeer 2020, "GLU Variants Improve Transformer"; Hendrycks and Gimpel 2016 for the tanh form of GELU; the gpt-oss
release.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .clamped_gate import ClampedGate
from .cpu import ops as cpu_ops
from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import choose_backend

ACTIVATIONS = ("silu", "gelu_tanh")

Activation = str | ClampedGate
# Largest |y - reference| for inputs of order one: (relative, absolute). In float32 the reference's 1 + tanh cancels for gates
# of about -5, which costs it 1.5e-6 on a GPU.
TOLERANCE = {torch.float32: (1e-5, 3e-6), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1.6e-2, 8e-3)}


def gated_activation(gate_up_TU: torch.Tensor, activation: str) -> torch.Tensor:
    """y [T, F], contiguous. `activation` is one of ACTIVATIONS; ValueError where it is not or shapes do not fit."""
    check_activation(activation)
    if gate_up_TU.dim() != 2 or gate_up_TU.shape[1] % 2:
        raise ValueError(f"gated_activation: gate_up {tuple(gate_up_TU.shape)} must be [tokens, 2 * intermediate]")
    if gate_up_TU.stride(1) != 1:
        raise ValueError("gated_activation: the last dimension of gate_up must be contiguous")
    backend = choose_backend("gated_activation", gate_up_TU)
    if backend == "cpp":
        return cpu_ops.gated_activation(gate_up_TU, activation)
    if backend == "triton":
        return _gated_activation_triton(gate_up_TU, activation)
    return gated_activation_ref(gate_up_TU, activation)


def check_activation(activation: str) -> None:
    """ValueError where `activation` is not one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not known: use one of {', '.join(ACTIVATIONS)}")


def gated_activation_ref(gate_up_TU: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate_TF, up_TF = gate_up_TU.float().chunk(2, dim=-1)
    if isinstance(activation, ClampedGate):
        gate_TF, up_TF = gate_TF.clamp(max=activation.limit), up_TF.clamp(-activation.limit, activation.limit) + 1
        gated_TF = gate_TF * torch.sigmoid(activation.alpha * gate_TF)
    else:
        gated_TF = F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate="tanh")
    return (gated_TF * up_TF).to(gate_up_TU.dtype)


def activation_constants(activation: Activation | None) -> dict[str, Any]:
    """The constants that `activate` takes, for the launch of a kernel that may end with a clamped gate."""
    if isinstance(activation, ClampedGate):
        return {"ACTIVATION": "clamped", "ALPHA": activation.alpha, "LIMIT": activation.limit}
    return {"ACTIVATION": activation, "ALPHA": 0.0, "LIMIT": 0.0}


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr = 0.0, LIMIT: tl.constexpr = 0.0):
    """activation(gate) * up of float32 blocks, for the kernels that end with it; ALPHA and LIMIT are of a clamped gate."""
    if ACTIVATION == "clamped":
        gate = tl.where(gate > LIMIT, LIMIT, gate)  # what is not a number stays so, as in the reference
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
        gated = gate * tl.sigmoid(gate * ALPHA)
    elif ACTIVATION == "silu":
        gated = gate * tl.sigmoid(gate)
    else:
        # (1 + tanh(z)) / 2 = sigmoid(2 z), with 2 z = sqrt(8 / pi) * (g + 0.044715 g^3)
        gated = gate * tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))
    return gated * up


@triton.jit
def _gated_activation_kernel(
    gate_up,
    y,
    num_columns,
    stride_row,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    let_next_start(EARLY_START)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    wait_for_previous(EARLY_START)
    gate = tl.load(gate_up + row * stride_row + column, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_row + num_columns + column, inside, other=0.0).to(tl.float32)
    gated = activate(gate, up, ACTIVATION)
    tl.store(y + row * num_columns + column, gated.to(y.dtype.element_ty), inside)


def _gated_activation_triton(gate_up_TU: torch.Tensor, activation: str) -> torch.Tensor:
    num_rows, num_columns = gate_up_TU.shape[0], gate_up_TU.shape[1] // 2
    y_TF = gate_up_TU.new_empty(num_rows, num_columns)
    if y_TF.numel() > 0:
        block = min(triton.next_power_of_2(num_columns), 1024)
        _gated_activation_kernel[(num_rows, triton.cdiv(num_columns, block))](
            gate_up_TU,
            y_TF,
            num_columns,
            gate_up_TU.stride(0),
            ACTIVATION=activation,
            BLOCK=block,
            **launch_options(gate_up_TU.device),
        )
    return y_TF
