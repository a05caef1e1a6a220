"""Recording work for the device as CUDA graphs.

What a graph reads and writes lies where it lay at the recording. All graphs of a recorder share one memory pool: a result is
valid until another of them is replayed, and whatever reads it is queued behind the replay, on the same stream.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from ..common.config import EngineConfig
from ..kernels.cuda.shareable_memory import bytes_at

Result = TypeVar("Result")


def uses_graphs(config: EngineConfig, device: torch.device) -> bool:
    return config.cuda_graphs and device.type == "cuda"


class Replayable(Protocol):
    """A CUDA graph, or in tests of the CPU a function."""

    def replay(self) -> None: ...


class GraphRecorder:
    """Records on the current device, on a stream of its own."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs the work as it is, which compiles its kernels. Nothing can be recorded that has not run before."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], Result]) -> tuple[Replayable, Result]:
        """(the graph, where the work's result will lie)."""
        graph = torch.cuda.CUDAGraph()
        with (
            _without_collector(),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            result = work()
        return graph, result

    def release(self, result: torch.Tensor) -> torch.Tensor:
        """The same contiguous result without a share in the life of its memory: the next recording may use that too."""
        assert result.is_contiguous()
        return bytes_at(result.data_ptr(), result.nbytes).view(result.dtype).view(result.shape)


@contextmanager
def _without_collector() -> Iterator[None]:
    """A tensor in a dead cycle that is freed during a recording would break it. (Collecting before each takes 0.1 s.)"""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
