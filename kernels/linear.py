"""Linear layer: y = x @ weight.T + bias.

On the CPU x is float32 and the weight stays in the checkpoint's dtype: a bfloat16 weight is widened exactly as it is read,
so the result is that of float32 at half the memory traffic. On CUDA x, weight and bias have one dtype, and cuBLAS or a
kernel for few rows (skinny_linear.py, streaming_linear.py) or many (tall_linear.py) does the work: whichever was measured to
be faster, see `choose_skinny_config`.
Sums are float32, rounded once. M rows (tokens), K inputs, N outputs.
"""

import torch
import torch.nn.functional as F

from . import tall_linear, tuning
from .cpu import ops as cpu_ops
from .dispatch import choose_backend, kernel_mode
from .skinny_linear import default_gemv_config, fits, invariant_config, skinny_linear
from .streaming_linear import serves

# Largest |y - reference| for x of order one and weights of order 1 / sqrt(K): (relative, absolute). float32: a
# sum of thousands of terms differs by a few 1e-5 between two orders of adding.
TOLERANCE = {torch.float32: (1e-4, 3e-5), torch.float16: (4e-3, 2e-3), torch.bfloat16: (3e-2, 1.6e-2)}


def linear(
    x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """y [..., N] for x [..., K], contiguous and of `out_dtype`, which is x's dtype (the default) or float32.

    ValueError where shapes or dtypes do not fit.
    """
    out_dtype = out_dtype or x.dtype
    check_linear(x, weight_NK, bias_N, out_dtype)
    backend = choose_backend("linear", x, weight_NK)
    if backend == "triton":
        return _linear_cuda(x, weight_NK, bias_N, out_dtype)
    if backend == "reference":
        return linear_ref(x, weight_NK, bias_N, out_dtype=out_dtype)
    if x.dim() == 2 and x.stride(1) == 1:
        return cpu_ops.linear(x, weight_NK, bias_N)
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    return cpu_ops.linear(x_MK, weight_NK, bias_N).view(*x.shape[:-1], weight_NK.shape[0])


def linear_ref(
    x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    bias = None if bias_N is None else bias_N.float()
    return F.linear(x.float(), weight_NK.float(), bias).to(out_dtype or x.dtype)


def choose_skinny_config(op: str, weight_NK: torch.Tensor, num_rows: int) -> tuning.Config | None:
    """The config of a kernel of skinny_linear.py, or None where cuBLAS (or what the op does without) is to be used.

    It is the measured choice for this GPU and shape. Where there is none: gemv for one row of 16-bit numbers. One row is where
    cuBLAS reads weights at 1.6 to 4.2 TB/s on an H200 and a gemv at 2.3 to 4.4, ahead of it at all sizes from K x N = 1024 x
    4096 to 4096 x 24576; for more rows the better kernel differs between shapes, so that is left to measurement. With
    PILOTFISH_KERNELS=invariant it is one for all.
    """
    if kernel_mode() == "invariant":
        return invariant_config(weight_NK.element_size())
    num_outputs, num_inputs = weight_NK.shape
    config = tuning.lookup(op, weight_NK.dtype, (num_outputs, num_inputs), num_rows, weight_NK.device)
    if config is None and num_rows == 1 and weight_NK.element_size() == 2:
        config = default_gemv_config(num_inputs)
    if config is not None and config["kernel"] == "tall":
        return config if tall_linear.serves(config, weight_NK, gated=op == "gated_linear") else None
    if config is not None and config["kernel"] == "streaming":
        if serves(config, weight_NK, num_rows, gated=op == "gated_linear"):
            return config
        config = config.get("twin")
    return config if config is not None and fits(config, num_rows, num_inputs) else None


def _linear_cuda(x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    check_one_dtype("linear", x, weight_NK)
    x_MK = as_rows(x)
    op = "linear" if out_dtype == x.dtype else "linear_float32"
    config = choose_skinny_config(op, weight_NK, x_MK.shape[0])
    if config is None:
        y_MN = cublas_linear(x_MK, weight_NK, bias_N, out_dtype=out_dtype)
    else:
        y_MN = skinny_linear(x_MK, weight_NK, bias_N, config, out_dtype=out_dtype)
    return y_MN.view(*x.shape[:-1], weight_NK.shape[0])


def cublas_linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *, out_dtype: torch.dtype
) -> torch.Tensor:
    """y [M, N] of `out_dtype` on CUDA."""
    if out_dtype == x_MK.dtype:
        return F.linear(x_MK, weight_NK, bias_N)
    y_MN = torch.mm(x_MK, weight_NK.T, out_dtype=out_dtype)
    return y_MN if bias_N is None else y_MN.add_(bias_N)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as [M, K] whose last dimension is contiguous."""
    x_MK = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def check_one_dtype(op: str, x: torch.Tensor, weight_NK: torch.Tensor) -> None:
    if x.dtype != weight_NK.dtype:
        raise ValueError(f"{op}: on CUDA x {x.dtype} and weight {weight_NK.dtype} must have one dtype")


def check_linear(x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, out_dtype: torch.dtype) -> None:
    """ValueError where shapes or dtypes do not fit."""
    if x.dim() == 0 or weight_NK.dim() != 2 or x.shape[-1] != weight_NK.shape[1]:
        raise ValueError(f"linear: weight {tuple(weight_NK.shape)} must be [outputs, inputs of x {tuple(x.shape)}]")
    if weight_NK.stride(1) != 1:
        raise ValueError("linear: the last dimension of the weight must be contiguous")
    if out_dtype not in (x.dtype, torch.float32):
        raise ValueError(f"linear: out_dtype {out_dtype} must be that of x, {x.dtype}, or float32")
    if bias_N is None:
        return
    if bias_N.shape != weight_NK.shape[:1] or bias_N.dtype != weight_NK.dtype or bias_N.stride(0) != 1:
        raise ValueError(
            f"linear: bias {tuple(bias_N.shape)} {bias_N.dtype} must be one contiguous {weight_NK.dtype} an output "
            f"({weight_NK.shape[0]})"
        )
