"""Linear layer: y = x @ weight.T + bias.

On the CPU x is float32 and the weight stays in the checkpoint's dtype: a bfloat16 weight is widened exactly as it is read,
so the result is that of float32 at half the memory traffic. Sums are float32. On CUDA x, weight and bias have one dtype
and cuBLAS does the work. M rows (tokens), K inputs, N outputs.
"""

import torch
import torch.nn.functional as F

from .cpu import ops as cpu_ops
from .dispatch import choose_backend

# Largest |y - reference| for x of order one and weights of order 1 / sqrt(K): (relative, absolute).
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float16: (4e-3, 2e-3), torch.bfloat16: (3e-2, 1.6e-2)}


def linear(x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """y [..., N] for x [..., K], contiguous and of x's dtype. ValueError where shapes or dtypes do not fit."""
    _check(x, weight_NK, bias_N)
    backend = choose_backend("linear", x, weight_NK)
    if backend == "triton":
        if x.dtype != weight_NK.dtype:
            raise ValueError(f"linear: on CUDA x {x.dtype} and weight {weight_NK.dtype} must have one dtype")
        return F.linear(x, weight_NK, bias_N)
    if backend == "reference":
        return linear_ref(x, weight_NK, bias_N)
    if x.dim() == 2 and x.stride(1) == 1:
        return cpu_ops.linear(x, weight_NK, bias_N)
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    return cpu_ops.linear(x_MK, weight_NK, bias_N).view(*x.shape[:-1], weight_NK.shape[0])


def linear_ref(x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    bias = None if bias_N is None else bias_N.float()
    return F.linear(x.float(), weight_NK.float(), bias).to(x.dtype)


def _check(x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
    if x.dim() == 0 or weight_NK.dim() != 2 or x.shape[-1] != weight_NK.shape[1]:
        raise ValueError(f"linear: weight {tuple(weight_NK.shape)} must be [outputs, inputs of x {tuple(x.shape)}]")
    if weight_NK.stride(1) != 1:
        raise ValueError("linear: the last dimension of the weight must be contiguous")
    if bias_N is None:
        return
    if bias_N.shape != weight_NK.shape[:1] or bias_N.dtype != weight_NK.dtype or bias_N.stride(0) != 1:
        raise ValueError(
            f"linear: bias {tuple(bias_N.shape)} {bias_N.dtype} must be one contiguous {weight_NK.dtype} an output "
            f"({weight_NK.shape[0]})"
        )
