"""Root-mean-square norm, with an optional residual added first, and before it what another rank adds to x.

    s = x + addend                        rounded to x.dtype
    r = s + residual                      rounded to x.dtype
    n = r / sqrt(mean(r^2) + eps)         in float32, rounded to x.dtype
    y = n * weight                        rounded to x.dtype

These are the roundings of Hugging Face's LlamaRMSNorm. T tokens, H hidden; x is [T, H], or [..., H] without residual (a
norm of each head). Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from typing import overload

import torch
import triton
import triton.language as tl

from .cpu import ops as cpu_ops
from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import choose_backend

# Largest |y - reference| for inputs of order one: (relative, absolute).
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1.6e-2, 8e-3)}


@overload
def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor: ...


@overload
def rms_norm(
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    residual_TH: torch.Tensor,
    addend_TH: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    residual_TH: torch.Tensor | None = None,
    addend_TH: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The norm of the last dimension: y, contiguous and of x's dtype; with a residual (y, r). An addend needs a residual.

    x may be a strided view whose last dimension is contiguous. ValueError where shapes or dtypes do not fit.
    """
    _check(x_TH, weight_H, residual_TH, addend_TH)
    backend = choose_backend("rms_norm", x_TH, weight_H)
    if backend == "cpp":
        x_TH = x_TH if addend_TH is None else x_TH + addend_TH
        return cpu_ops.rms_norm(x_TH, weight_H, eps, residual_TH=residual_TH)
    if backend == "triton":
        return _rms_norm_triton(x_TH, weight_H, eps, residual_TH=residual_TH, addend_TH=addend_TH)
    return rms_norm_ref(x_TH, weight_H, eps, residual_TH=residual_TH, addend_TH=addend_TH)


def rms_norm_ref(
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    residual_TH: torch.Tensor | None = None,
    addend_TH: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    x_TH = x_TH if addend_TH is None else x_TH + addend_TH
    new_residual_TH = x_TH if residual_TH is None else x_TH + residual_TH
    wide_TH = new_residual_TH.float()
    normed_TH = wide_TH * torch.rsqrt(wide_TH.square().mean(-1, keepdim=True) + eps)
    y_TH = (normed_TH.to(x_TH.dtype).float() * weight_H.float()).to(x_TH.dtype)
    return y_TH if residual_TH is None else (y_TH, new_residual_TH)


@triton.jit
def norm_row(values, gain, eps, HIDDEN: tl.constexpr):
    """Of a row's `values`, zero beyond HIDDEN, and float32 `gain`. Kernels launched with `row_options` give the same bits."""
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / HIDDEN + eps)
    normed = (wide * scale).to(values.dtype).to(tl.float32)
    return (normed * gain).to(values.dtype)


def row_options(hidden: int) -> dict[str, int]:
    """For the launch of a kernel whose programs norm a row each."""
    block = triton.next_power_of_2(hidden)
    num_warps = min(max(block // 256, 1), 16)  # 16 bytes of a row a thread, in bfloat16
    return {"HIDDEN": hidden, "BLOCK": block, "num_warps": num_warps}


@triton.jit
def _rms_norm_kernel(
    x,
    weight,
    addend,
    residual,
    y,
    new_residual,
    eps,
    num_inner,
    stride_outer,
    stride_inner,
    stride_addend,
    stride_residual,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    """One program a row; row (outer, inner) of x lies at outer * stride_outer + inner * stride_inner."""
    let_next_start(EARLY_START)
    program = tl.program_id(0)
    outer, inner = (program // num_inner).to(tl.int64), (program % num_inner).to(tl.int64)  # divided as 32 bits: quicker
    row = program.to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    gain = tl.load(weight + column, inside, other=0.0).to(tl.float32)  # on its way while the kernel before ends
    wait_for_previous(EARLY_START)
    values = tl.load(x + outer * stride_outer + inner * stride_inner + column, inside, other=0.0)
    if HAS_ADDEND:
        other = tl.load(addend + row * stride_addend + column, inside, other=0.0)
        values = (values.to(tl.float32) + other.to(tl.float32)).to(values.dtype)
    if HAS_RESIDUAL:
        added = tl.load(residual + row * stride_residual + column, inside, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(new_residual + row * HIDDEN + column, values, inside)
    tl.store(y + row * HIDDEN + column, norm_row(values, gain, eps, HIDDEN), inside)


def _rms_norm_triton(
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    residual_TH: torch.Tensor | None = None,
    addend_TH: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    y_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    new_residual_TH = None if residual_TH is None else torch.empty_like(y_TH)
    if y_TH.numel() > 0:
        hidden = x_TH.shape[-1]
        num_inner = x_TH.shape[-2] if x_TH.dim() > 1 else 1
        x_OIH = x_TH.reshape(-1, num_inner, hidden) if x_TH.dim() != 2 else x_TH.unsqueeze(1)
        _rms_norm_kernel[(y_TH.numel() // hidden,)](
            x_OIH,
            weight_H,
            addend_TH,
            residual_TH,
            y_TH,
            new_residual_TH,
            eps,
            x_OIH.shape[1],
            x_OIH.stride(0),
            x_OIH.stride(1),
            0 if addend_TH is None else addend_TH.stride(0),
            0 if residual_TH is None else residual_TH.stride(0),
            HAS_ADDEND=addend_TH is not None,
            HAS_RESIDUAL=residual_TH is not None,
            **row_options(hidden),
            **launch_options(x_TH.device),
        )
    return y_TH if new_residual_TH is None else (y_TH, new_residual_TH)


def _check(
    x_TH: torch.Tensor, weight_H: torch.Tensor, residual_TH: torch.Tensor | None, addend_TH: torch.Tensor | None
) -> None:
    if x_TH.dim() == 0 or weight_H.dim() != 1 or weight_H.shape[0] != x_TH.shape[-1]:
        raise ValueError(f"rms_norm: weight {tuple(weight_H.shape)} does not fit x {tuple(x_TH.shape)}")
    if x_TH.stride()[-1] != 1 or weight_H.stride()[0] != 1:
        raise ValueError("rms_norm: the last dimension of x and the weight must be contiguous")
    if residual_TH is None:
        if addend_TH is not None:
            raise ValueError("rms_norm: an addend needs a residual")
        return
    if x_TH.dim() != 2:
        raise ValueError(f"rms_norm: a residual needs x of [tokens, hidden], not {tuple(x_TH.shape)}")
    for name, tensor in (("residual", residual_TH), ("addend", addend_TH)):
        if tensor is None:
            continue
        if tensor.shape != x_TH.shape or tensor.dtype != x_TH.dtype or tensor.device != x_TH.device:
            raise ValueError(
                f"rms_norm: {name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device} "
                f"must equal x {tuple(x_TH.shape)} {x_TH.dtype} {x_TH.device}"
            )
        if tensor.stride(1) != 1:
            raise ValueError(f"rms_norm: the last dimension of the {name} must be contiguous")
