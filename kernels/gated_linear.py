"""First half of a gated MLP: y = activation(gate) * up, where [gate, up] = x @ weight.T + bias.

The rows of the weight are the gate's, then up's. The linear layer's result is rounded to the dtype of x before the activation,
the product once more. On CUDA one kernel does both for few rows, so that gate and up are never written; otherwise `linear`
and `gated_activation` run one after the other. M rows (tokens), K inputs, F intermediate, U = 2 F.
"""

import torch

from .dispatch import choose_backend
from .gated_activation import check_activation, gated_activation, gated_activation_ref
from .linear import as_rows, check_linear, check_one_dtype, choose_skinny_config, linear, linear_ref
from .skinny_linear import skinny_linear

# Largest |y - reference| for x of order one and weights of order 1 / sqrt(K): (relative, absolute).
TOLERANCE = {torch.float32: (2e-4, 2e-5), torch.float16: (8e-3, 4e-3), torch.bfloat16: (5e-2, 3e-2)}


def gated_linear(
    x_MK: torch.Tensor, weight_UK: torch.Tensor, bias_U: torch.Tensor | None = None, *, activation: str
) -> torch.Tensor:
    """y [M, F], contiguous and of x's dtype. `activation` is one of gated_activation.ACTIVATIONS.

    ValueError where it is not, or where shapes or dtypes do not fit.
    """
    check_activation(activation)
    if x_MK.dim() != 2 or weight_UK.dim() != 2 or weight_UK.shape[0] % 2:
        raise ValueError(
            f"gated_linear: x {tuple(x_MK.shape)} must be [rows, inputs] and the weight {tuple(weight_UK.shape)} "
            "[2 * intermediate, inputs]"
        )
    check_linear(x_MK, weight_UK, bias_U, x_MK.dtype)
    if choose_backend("linear", x_MK, weight_UK) == "triton":
        check_one_dtype("gated_linear", x_MK, weight_UK)
        config = choose_skinny_config("gated_linear", weight_UK, x_MK.shape[0])
        if config is not None:
            return skinny_linear(as_rows(x_MK), weight_UK, bias_U, config, out_dtype=x_MK.dtype, activation=activation)
    return gated_activation(linear(x_MK, weight_UK, bias_U), activation)


def gated_linear_ref(
    x_MK: torch.Tensor, weight_UK: torch.Tensor, bias_U: torch.Tensor | None = None, *, activation: str
) -> torch.Tensor:
    return gated_activation_ref(linear_ref(x_MK, weight_UK, bias_U), activation)
