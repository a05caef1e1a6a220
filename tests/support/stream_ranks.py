"""Ranks as streams of this process on one GPU, for the kernels over ranks: they do not know that all memory is here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pilotfish.kernels.peer_buffers import NOTHING, PeerBuffers, receive_bytes


class StreamRanks:
    """`size` ranks, up to 4: more streams may share a queue of the GPU. Few CTAs a call: those of all ranks run at once."""

    def __init__(self, size: int, *, capacity_bytes: int = 1 << 20, timeout_s: float = 20.0) -> None:
        words = (receive_bytes(size, capacity_bytes) // 4,)
        self.memory = [torch.full(words, NOTHING - (1 << 32), dtype=torch.int32, device="cuda") for _ in range(size)]
        self.streams = [torch.cuda.Stream() for _ in range(size)]
        for stream in self.streams:  # what results need is there: allocating may wait for a kernel that waits for one to come
            with torch.cuda.stream(stream):
                _ = [torch.empty(900_000, dtype=torch.uint8, device="cuda") for _ in range(6)]
        addresses = tuple(memory.data_ptr() for memory in self.memory)
        self.buffers = [
            PeerBuffers(
                rank=rank,
                addresses=addresses,
                capacity_bytes=capacity_bytes,
                state=torch.zeros(4, dtype=torch.int32, device="cuda"),
                failed=torch.zeros(1, dtype=torch.int32, pin_memory=True),
                timeout_s=timeout_s,
            )
            for rank in range(size)
        ]

    def run(self, call: Callable[[int, PeerBuffers], Any], *, first: int = 0) -> list[Any]:
        """What call(rank, buffers) returns on each rank from `first` on; they run side by side."""
        torch.cuda.synchronize()
        results = []
        for rank in range(first, len(self.streams)):
            with torch.cuda.stream(self.streams[rank]):
                results.append(call(rank, self.buffers[rank]))
        torch.cuda.synchronize()
        return results

    def assert_all_came(self) -> None:
        assert [buffers.failure for buffers in self.buffers] == [""] * len(self.buffers)


def buffers_on_cpu(**changes: Any) -> PeerBuffers:
    """For checks that end before a launch: 2 ranks, messages of up to 4096 bytes."""
    values = {"rank": 0, "addresses": (0, 0), "capacity_bytes": 4096, "timeout_s": 1.0}
    state, failed = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return PeerBuffers(**(values | {"state": state, "failed": failed} | changes))


def make_parts(
    size: int, shape: tuple[int, ...], dtype: torch.dtype, *, device: str = "cpu", seed: int = 0
) -> list[torch.Tensor]:
    """What each rank has: numbers of order one, some of them minus zeros."""
    generator = torch.Generator(device).manual_seed(seed)
    parts = torch.randn(size, *shape, generator=generator, device=device)
    parts[parts.abs() < 0.02] = -0.0
    parts[..., :3] = -0.0
    return list(parts.to(dtype))
