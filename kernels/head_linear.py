"""One linear layer a head: y[t, n] = weight[n] @ x[t, n].

What latent attention puts a head's queries into the latent space with, and its outputs back. Sums are float32, rounded once to
the dtype of x. On the CPU x is float32 and the weight may be bfloat16, as in linear.py; on CUDA both have one dtype and cuBLAS
does the work, a batch of N products.

T tokens, N heads, K inputs, M outputs. Source: DeepSeek-AI 2024, "DeepSeek-V2" (the absorbed form of latent attention).
"""

import torch

from .dispatch import choose_backend
from .linear import TOLERANCE, check_one_dtype

__all__ = ["TOLERANCE", "head_linear", "head_linear_ref"]


def head_linear(x_TNK: torch.Tensor, weight_NMK: torch.Tensor) -> torch.Tensor:
    """y [T, N, M], not always contiguous. Both may be strided views. ValueError where shapes or dtypes do not fit."""
    if x_TNK.dim() != 3 or weight_NMK.dim() != 3 or weight_NMK.shape[::2] != x_TNK.shape[1:]:
        raise ValueError(
            f"head_linear: weight {tuple(weight_NMK.shape)} must be [heads, outputs, inputs] of x {tuple(x_TNK.shape)}, "
            "[tokens, heads, inputs]"
        )
    if choose_backend("head_linear", x_TNK, weight_NMK) == "triton":
        check_one_dtype("head_linear", x_TNK, weight_NMK)
        return torch.bmm(x_TNK.transpose(0, 1), weight_NMK.transpose(1, 2)).transpose(0, 1)
    return head_linear_ref(x_TNK, weight_NMK)


def head_linear_ref(x_TNK: torch.Tensor, weight_NMK: torch.Tensor) -> torch.Tensor:
    y_NTM = torch.bmm(x_TNK.float().transpose(0, 1), weight_NMK.float().transpose(1, 2))
    return y_NTM.transpose(0, 1).to(x_TNK.dtype)
