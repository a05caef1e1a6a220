"""Sum over the ranks of one machine of which each gets its own rows, through memory that they map of each other.

    y = x_0[rows] + x_1[rows] + ... + x_{n-1}[rows]       in float32, in the order of ranks, rounded once to x.dtype

where rows are those of the rank that computes y: the first N of each x belong to rank 0, the next N to rank 1, and so on. One
kernel, one trip over NVLink; peer_buffers.py says what all ranks must do. bfloat16 and float16, H a multiple of 8.

N rows, H hidden, R = ranks * N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .all_reduce import all_reduce_ref
from .peer_buffers import UNIT_BYTES, PeerBuffers, launch, misplaced_reason


def unfit_reason(shape: torch.Size, dtype: torch.dtype, buffers: PeerBuffers) -> str | None:
    """Why no x of this shape can be summed through the buffers, or None; the same on all ranks."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"x is {dtype}, it takes bfloat16 and float16"
    if len(shape) != 2 or shape[0] % buffers.size or shape[1] % 8:
        return f"x is {tuple(shape)}, it takes [{buffers.size} * rows, a multiple of 8]"
    part_bytes = shape.numel() * dtype.itemsize // buffers.size
    if part_bytes > buffers.capacity_bytes:
        return f"a rank's rows have {part_bytes} bytes, the buffers hold {buffers.capacity_bytes}"
    return None


def reduce_scatter(x_RH: torch.Tensor, buffers: PeerBuffers) -> torch.Tensor:
    """y [N, H], this rank's rows of the sum of every rank's x.

    Raises:
        ValueError: x does not fit (`unfit_reason`), or is not contiguous from a multiple of 16 bytes on.
        loader.BuildError: the kernel cannot be compiled here.
    """
    reason = unfit_reason(x_RH.shape, x_RH.dtype, buffers) or misplaced_reason(x_RH)
    if reason is not None:
        raise ValueError(f"reduce_scatter: {reason}")
    y_NH = x_RH.new_empty(x_RH.shape[0] // buffers.size, x_RH.shape[1])
    if y_NH.numel():
        macros = (("FLOAT16", int(x_RH.dtype == torch.float16)),)
        launch("reduce_scatter", macros, buffers, (x_RH, y_NH), total_units=y_NH.nbytes // UNIT_BYTES)
    return y_NH


def reduce_scatter_ref(parts_RH: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """What `rank` gets of what each rank has."""
    return all_reduce_ref([part_RH.chunk(len(parts_RH))[rank] for part_RH in parts_RH])
