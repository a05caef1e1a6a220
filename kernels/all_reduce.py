"""Sum over the ranks of one machine through memory that they map of each other, alone or with what follows it in a layer.

    s = x_0 + x_1 + ... + x_{n-1}         in float32, in the order of ranks, rounded once to x.dtype
    r, y = s + residual, rms_norm(r)      with the roundings of rms_norm.py

So the fused op rounds where all_reduce, then rms_norm with a residual would, and every rank gets equal bits. One kernel, one
trip over NVLink; peer_buffers.py says what all ranks must do. bfloat16 and float16, rows of a multiple of 8 numbers.

T tokens, H hidden.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from .cuda import loader
from .peer_buffers import CHUNK_UNITS, MAX_THREADS, UNIT_BYTES, PeerBuffers, can_launch, launch, misplaced_reason
from .rms_norm import rms_norm_ref

SOURCE = "all_reduce"
_UNIT_NUMBERS = 8
MAX_HIDDEN = 4 * MAX_THREADS * _UNIT_NUMBERS  # with the norm: 4 units a thread


def unfit_reason(shape: torch.Size, dtype: torch.dtype, buffers: PeerBuffers) -> str | None:
    """Why no x of this shape can be summed through the buffers, or None; the same on all ranks."""
    num_bytes = shape.numel() * dtype.itemsize
    if dtype not in (torch.bfloat16, torch.float16):
        return f"x is {dtype}, it takes bfloat16 and float16"
    if shape[-1] % _UNIT_NUMBERS:
        return f"x is {tuple(shape)}, the last dimension must be a multiple of {_UNIT_NUMBERS}"
    if num_bytes > buffers.capacity_bytes:
        return f"x has {num_bytes} bytes, the buffers hold {buffers.capacity_bytes}"
    return None


def all_reduce(x: torch.Tensor, buffers: PeerBuffers, *, two_shot: bool = False) -> torch.Tensor:
    """The sum of every rank's x, of its shape. `two_shot` sends less where there are more than two ranks, in two trips.

    Raises:
        ValueError: x does not fit (`unfit_reason`), or is not contiguous from a multiple of 16 bytes on.
        loader.BuildError: the kernel cannot be compiled here.
    """
    _check(x, buffers)
    y = torch.empty_like(x)
    if x.numel():
        _launch(buffers, (x, y, None, None, None), 0.0, chunk_units=CHUNK_UNITS, two_shot=two_shot)
    return y


def all_reduce_norm(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    buffers: PeerBuffers,
    *,
    two_shot: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, r): the norm of residual + the sum of every rank's x, and what it is the norm of. Raises as all_reduce does."""
    _check(x_TH, buffers)
    hidden = x_TH.shape[-1]
    if x_TH.dim() != 2 or hidden > MAX_HIDDEN:
        raise ValueError(f"all_reduce_norm: x must be [tokens, hidden], hidden up to {MAX_HIDDEN}, not {tuple(x_TH.shape)}")
    for name, tensor, shape in (("residual", residual_TH, x_TH.shape), ("weight", weight_H, x_TH.shape[1:])):
        if tensor.shape != shape or tensor.dtype != x_TH.dtype or tensor.device != x_TH.device:
            raise ValueError(
                f"all_reduce_norm: {name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device} "
                f"does not fit x {tuple(x_TH.shape)} {x_TH.dtype} {x_TH.device}"
            )
        if not tensor.is_contiguous() or tensor.data_ptr() % UNIT_BYTES:
            raise ValueError(f"all_reduce_norm: {name} must be contiguous and begin at a multiple of {UNIT_BYTES} bytes")
    y_TH, new_residual_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    if x_TH.numel():
        tensors = (x_TH, y_TH, residual_TH, new_residual_TH, weight_H)
        _launch(buffers, tensors, eps, chunk_units=hidden // _UNIT_NUMBERS, two_shot=two_shot)
    return y_TH, new_residual_TH


def all_reduce_ref(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of what each rank has."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def all_reduce_norm_ref(
    parts_TH: Sequence[torch.Tensor], residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm_ref(all_reduce_ref(parts_TH), weight_H, eps, residual_TH=residual_TH)


def is_available(num_ranks: int, device: torch.device) -> bool:
    """Whether the kernel can be had here; compiles it. Where it cannot be compiled, the loader has said why."""
    macros = _macros(torch.bfloat16, norm=True, two_shot=False)
    return can_launch(SOURCE, (("RANKS", num_ranks), ("UNITS", 1), *macros), device)


def _macros(dtype: torch.dtype, *, norm: bool, two_shot: bool) -> loader.Macros:
    return ("FLOAT16", int(dtype == torch.float16)), ("NORM", int(norm)), ("TWO_SHOT", int(two_shot))


def _launch(
    buffers: PeerBuffers, tensors: Sequence[torch.Tensor | None], eps: float, *, chunk_units: int, two_shot: bool
) -> None:
    """`tensors`: x, y, residual, new residual, weight."""
    x, *_, weight = tensors
    assert x is not None
    launch(
        SOURCE,
        _macros(x.dtype, norm=weight is not None, two_shot=two_shot),
        buffers,
        tensors,
        total_units=x.nbytes // UNIT_BYTES,
        chunk_units=chunk_units,
        more=(ctypes.c_float(eps),),
    )


def _check(x: torch.Tensor, buffers: PeerBuffers) -> None:
    reason = unfit_reason(x.shape, x.dtype, buffers) or misplaced_reason(x)
    if reason is not None:
        raise ValueError(f"all_reduce: {reason}")
