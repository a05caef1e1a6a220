"""Memory through which kernels over the ranks of one machine exchange numbers, and the launch of such kernels.

Each rank has a receive buffer on its GPU that all others map (cuda/peers.cuh has the protocol). The kernels are ops of their
own: all_reduce.py, reduce_scatter.py, all_gather.py, meet.py. They serve 2 to 8 ranks on compute capability 9.0, messages that
fit the buffers, and may be captured in CUDA graphs; what counts the calls is on the device.

All ranks make the same calls, of the same sizes, in the same order, each on one stream. A call that waits for another rank for
longer than the buffers' `timeout_s` gives up, and so it does when the host calls `end_waits`: its result, and that of every
later call, is of no use. `failure` says so to the host, which must ask before it uses what a step computed.

Source of the protocol: Lamport 1983, "Specifying concurrent program modules"; used so by TensorRT-LLM.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from .cuda import loader

MAX_RANKS = 8
UNIT_BYTES = 16  # what a thread sends at once
CHUNK_UNITS = 512  # of a CTA, where there are no rows
MAX_THREADS = 1024
# Every half is minus zero, which stands for "not here yet".
NOTHING = 0x80008000
_GENERATIONS = 3
_ENDED = MAX_RANKS + 1


@dataclass(frozen=True, kw_only=True, eq=False)
class PeerBuffers:
    """One rank's way to the others' memory.

    Attributes:
        rank: this one.
        addresses: of every rank's receive buffer, as mapped into this process: `receive_bytes` of memory on that rank's GPU,
            filled with NOTHING before any rank's first call.
        capacity_bytes: of a slot: the most that a call can send to another rank.
        state: int32 [4] on this GPU, zeros at first.
        failed: int32 [1] in pinned host memory, zero at first; then 1 + a rank that did not come, or _ENDED.
        timeout_s: how long a call waits for the other ranks.
    """

    rank: int
    addresses: tuple[int, ...]
    capacity_bytes: int
    state: torch.Tensor
    failed: torch.Tensor
    timeout_s: float

    def __post_init__(self) -> None:
        if not 2 <= len(self.addresses) <= MAX_RANKS or not 0 <= self.rank < len(self.addresses):
            raise ValueError(f"peer buffers: rank {self.rank} of {len(self.addresses)} ranks; it serves 2 to {MAX_RANKS}")
        if self.capacity_bytes <= 0 or self.capacity_bytes % UNIT_BYTES:
            raise ValueError(f"peer buffers: capacity_bytes {self.capacity_bytes} is not a positive multiple of {UNIT_BYTES}")

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.addresses)

    @property
    def failure(self) -> str:
        """Why what the calls have computed is of no use; "" while it is. In two shots the named rank may itself have waited."""
        word = int(self.failed)
        if word == _ENDED:
            return "waiting for the other ranks was ended"
        return f"rank {word - 1} took no part in a collective within {self.timeout_s:g} s" if word else ""

    def end_waits(self) -> None:
        """From any thread: a call that waits ends within milliseconds, and later ones do not wait."""
        self.failed.fill_(_ENDED)


def receive_bytes(num_ranks: int, capacity_bytes: int) -> int:
    """What each rank must allocate."""
    return _GENERATIONS * num_ranks * capacity_bytes


def can_launch(source: str, macros: loader.Macros, device: torch.device) -> bool:
    """Whether the kernel can be had here; compiles it. Where it cannot be compiled, the loader has said why."""
    return loader.can_run_on(device) and loader.load(source, macros, device.index) is not None


def misplaced_reason(x: torch.Tensor) -> str | None:
    """Why x cannot be sent from where it lies, or None."""
    if not x.is_contiguous() or x.data_ptr() % UNIT_BYTES:
        return f"x must be contiguous and begin at a multiple of {UNIT_BYTES} bytes"
    return loader.misplaced_reason("x", x.device)


def split_chunk(chunk_units: int) -> tuple[int, int]:
    """(units of a thread, threads) for a chunk: whole warps, as few idle as possible."""
    units = triton.cdiv(chunk_units, MAX_THREADS)
    return units, triton.cdiv(triton.cdiv(chunk_units, units), 32) * 32


def launch(
    source: str,
    macros: loader.Macros,
    buffers: PeerBuffers,
    tensors: Sequence[torch.Tensor | None],
    *,
    total_units: int,
    chunk_units: int = CHUNK_UNITS,
    more: Sequence[loader.Argument] = (),
    early_start: bool = True,
) -> None:
    """The kernel of cuda/{source}.cu on `tensors` and `more`; `macros` besides RANKS and UNITS. `early_start` as loader.launch.

    Raises:
        loader.BuildError: it cannot be compiled here.
    """
    device = buffers.state.device
    units, num_threads = split_chunk(chunk_units)
    kernel = loader.load(source, (("RANKS", buffers.size), ("UNITS", units), *macros), device.index)
    if kernel is None:
        raise loader.BuildError(f"{source} cannot be compiled: {loader.unavailable_reason()}")
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    loader.launch(
        kernel,
        (
            (ctypes.c_uint64 * buffers.size)(*buffers.addresses),
            *(_pointer(tensor) for tensor in (*tensors, buffers.state, buffers.failed)),
            ctypes.c_uint32(buffers.rank),
            ctypes.c_uint32(total_units),
            ctypes.c_uint32(chunk_units),
            ctypes.c_uint32(buffers.capacity_bytes // UNIT_BYTES),
            ctypes.c_uint64(int(buffers.timeout_s * 1e9)),
            *more,
        ),
        grid=(min(triton.cdiv(total_units, chunk_units), num_processors), 1),
        num_threads=num_threads,
        shared_bytes=0,
        early_start=early_start,
    )


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
