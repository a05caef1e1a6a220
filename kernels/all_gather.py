"""Every rank's x behind each other, on the ranks of one machine, through memory that they map of each other.

    y = (x_0, x_1, ..., x_{n-1})      bit by bit, along a new first dimension

One kernel, one trip over NVLink; peer_buffers.py says what all ranks must do. Any dtype, a multiple of 4 bytes. Each word is
sent with a mark, so twice as much crosses NVLink as x has: it is for small messages.
"""

from __future__ import annotations

import ctypes

import torch
import triton

from .peer_buffers import UNIT_BYTES, PeerBuffers, launch, misplaced_reason

_WORD_BYTES, _UNIT_WORDS = 4, 2


def unfit_reason(shape: torch.Size, dtype: torch.dtype, buffers: PeerBuffers) -> str | None:
    """Why no x of this shape can be gathered through the buffers, or None; the same on all ranks."""
    num_bytes = shape.numel() * dtype.itemsize
    if num_bytes % _WORD_BYTES:
        return f"x has {num_bytes} bytes, which must be a multiple of {_WORD_BYTES}"
    if _num_units(num_bytes) * UNIT_BYTES > buffers.capacity_bytes:
        return f"x has {num_bytes} bytes, sent with as many of marks, the buffers hold {buffers.capacity_bytes}"
    return None


def all_gather(x: torch.Tensor, buffers: PeerBuffers) -> torch.Tensor:
    """y [ranks, *x.shape], every rank's x in their order.

    Raises:
        ValueError: x does not fit (`unfit_reason`), or is not contiguous from a multiple of 16 bytes on.
        loader.BuildError: the kernel cannot be compiled here.
    """
    reason = unfit_reason(x.shape, x.dtype, buffers) or misplaced_reason(x)
    if reason is not None:
        raise ValueError(f"all_gather: {reason}")
    y = x.new_empty((buffers.size, *x.shape))
    if x.numel():
        num_words = ctypes.c_uint32(x.nbytes // _WORD_BYTES)
        launch("all_gather", (), buffers, (x, y), total_units=_num_units(x.nbytes), more=(num_words,))
    return y


def _num_units(num_bytes: int) -> int:
    """What is sent of so many bytes."""
    return triton.cdiv(num_bytes, _UNIT_WORDS * _WORD_BYTES)
