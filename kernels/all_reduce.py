"""Sum over the ranks of one machine through GPU memory that they map of each other, alone or with what follows it in a layer.

    s = x_0 + x_1 + ... + x_{n-1}         in float32, in the order of ranks, rounded once to x.dtype
    r, y = s + residual, rms_norm(r)      with the roundings of rms_norm.py

So the fused op rounds where all_reduce, then rms_norm with a residual would, and every rank gets equal bits. One kernel, one
trip over NVLink: cuda/all_reduce.cu has the protocol. 2 to 8 ranks, bfloat16 and float16, rows of a multiple of 8 numbers, any
size that fits the buffers, on compute capability 9.0. Calls may be captured in CUDA graphs; what counts them is on the device.

All ranks make the same calls, of the same sizes, in the same order, each on one stream. A call that waits for another rank for
longer than the buffers' `timeout_s` gives up: its result, and that of every later call, is of no use. `missing_rank` says so to
the host, which must ask before it uses what a step computed.

T tokens, H hidden. Source of the protocol: Lamport 1983, "Specifying concurrent program modules"; used so by TensorRT-LLM.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from .cuda import loader
from .rms_norm import rms_norm_ref

MAX_RANKS = 8
SOURCE = "all_reduce"
_GENERATIONS = 3
_UNIT_BYTES = 16
_UNIT_NUMBERS = 8
_CHUNK_UNITS = 512  # of a CTA, where there are no rows
_MAX_THREADS = 1024
MAX_HIDDEN = 4 * _MAX_THREADS * _UNIT_NUMBERS  # with the norm: 4 units a thread
# Every half is minus zero, which stands for "not here yet".
NOTHING = 0x80008000


@dataclass(frozen=True, kw_only=True, eq=False)
class PeerBuffers:
    """One rank's way to the others' memory.

    Attributes:
        rank: this one.
        addresses: of every rank's receive buffer, as mapped into this process: `receive_bytes` of memory on that rank's GPU,
            filled with NOTHING before any rank's first call.
        capacity_bytes: the largest message.
        state: int32 [4] on this GPU, zeros at first.
        missing: int32 [1] in pinned host memory, zero at first.
        timeout_s: how long a call waits for the other ranks.
    """

    rank: int
    addresses: tuple[int, ...]
    capacity_bytes: int
    state: torch.Tensor
    missing: torch.Tensor
    timeout_s: float

    def __post_init__(self) -> None:
        if not 2 <= len(self.addresses) <= MAX_RANKS or not 0 <= self.rank < len(self.addresses):
            raise ValueError(f"all_reduce: rank {self.rank} of {len(self.addresses)} ranks; it serves 2 to {MAX_RANKS}")
        if self.capacity_bytes <= 0 or self.capacity_bytes % _UNIT_BYTES:
            raise ValueError(f"all_reduce: capacity_bytes {self.capacity_bytes} is not a positive multiple of {_UNIT_BYTES}")

    @property
    def missing_rank(self) -> int | None:
        """A rank that a finished call has waited for in vain (in two shots perhaps one that waited itself); None without."""
        word = int(self.missing)
        return word - 1 if word else None


def receive_bytes(num_ranks: int, capacity_bytes: int) -> int:
    """What each rank must allocate."""
    return _GENERATIONS * num_ranks * capacity_bytes


def unfit_reason(shape: torch.Size, dtype: torch.dtype, buffers: PeerBuffers) -> str | None:
    """Why no x of this shape can be summed through the buffers, or None; the same on all ranks."""
    num_bytes = shape.numel() * dtype.itemsize
    if dtype not in (torch.bfloat16, torch.float16):
        return f"x is {dtype}, it takes bfloat16 and float16"
    if shape.numel() % _UNIT_NUMBERS or shape[-1] % _UNIT_NUMBERS:
        return f"x is {tuple(shape)}, the last dimension must be a multiple of {_UNIT_NUMBERS}"
    if num_bytes > buffers.capacity_bytes:
        return f"x has {num_bytes} bytes, the buffers hold {buffers.capacity_bytes}"
    return None


def _misplaced_reason(x: torch.Tensor) -> str | None:
    """Why x cannot be summed where it lies, or None."""
    if not x.is_contiguous() or x.data_ptr() % _UNIT_BYTES:
        return f"x must be contiguous and begin at a multiple of {_UNIT_BYTES} bytes"
    if not loader.can_run_on(x.device):
        return f"it is for compute capability {'.'.join(map(str, loader.CAPABILITY))}, x is on {x.device}"
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
        _launch(buffers, x, y, None, None, None, 0.0, chunk_units=_CHUNK_UNITS, two_shot=two_shot)
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
        if not tensor.is_contiguous() or tensor.data_ptr() % _UNIT_BYTES:
            raise ValueError(f"all_reduce_norm: {name} must be contiguous and begin at a multiple of {_UNIT_BYTES} bytes")
    y_TH, new_residual_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    if x_TH.numel():
        chunk_units = hidden // _UNIT_NUMBERS
        _launch(
            buffers, x_TH, y_TH, residual_TH, new_residual_TH, weight_H, eps, chunk_units=chunk_units, two_shot=two_shot
        )  # fmt: skip
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


def load_kernel(num_ranks: int, device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernel can be had here; compiles it. Where it cannot, the loader has said why."""
    macros = _macros(num_ranks, 1, dtype, norm=True, two_shot=False)
    return loader.can_run_on(device) and loader.load(SOURCE, macros, device.index) is not None


def _macros(num_ranks: int, units: int, dtype: torch.dtype, *, norm: bool, two_shot: bool) -> loader.Macros:
    return (
        ("RANKS", num_ranks),
        ("UNITS", units),
        ("FLOAT16", int(dtype == torch.float16)),
        ("NORM", int(norm)),
        ("TWO_SHOT", int(two_shot)),
    )


def split_chunk(chunk_units: int) -> tuple[int, int]:
    """(units of a thread, threads) for a chunk: whole warps, as few idle as possible."""
    units = triton.cdiv(chunk_units, _MAX_THREADS)
    return units, triton.cdiv(triton.cdiv(chunk_units, units), 32) * 32


def _launch(
    buffers: PeerBuffers,
    x: torch.Tensor,
    y: torch.Tensor,
    residual: torch.Tensor | None,
    new_residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    *,
    chunk_units: int,
    two_shot: bool,
) -> None:
    num_ranks, total_units = len(buffers.addresses), x.nbytes // _UNIT_BYTES
    units, num_threads = split_chunk(chunk_units)
    macros = _macros(num_ranks, units, x.dtype, norm=weight is not None, two_shot=two_shot)
    kernel = loader.load(SOURCE, macros, x.device.index)
    if kernel is None:
        raise loader.BuildError(f"all_reduce cannot be compiled: {loader.unavailable_reason()}")
    num_processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    loader.launch(
        kernel,
        (
            (ctypes.c_uint64 * num_ranks)(*buffers.addresses),
            *(_pointer(tensor) for tensor in (x, y, residual, new_residual, weight, buffers.state, buffers.missing)),
            ctypes.c_uint32(buffers.rank),
            ctypes.c_uint32(total_units),
            ctypes.c_uint32(chunk_units),
            ctypes.c_uint32(buffers.capacity_bytes // _UNIT_BYTES),
            ctypes.c_float(eps),
            ctypes.c_uint64(int(buffers.timeout_s * 1e9)),
        ),
        grid=(min(triton.cdiv(total_units, chunk_units), num_processors), 1),
        num_threads=num_threads,
        shared_bytes=0,
        early_start=True,
    )


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _check(x: torch.Tensor, buffers: PeerBuffers) -> None:
    reason = unfit_reason(x.shape, x.dtype, buffers) or _misplaced_reason(x)
    if reason is not None:
        raise ValueError(f"all_reduce: {reason}")
