"""Times of kernels as a decode step runs them: captured in a CUDA graph, their weights not in the L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

# Copies of what is read, together, so that none of it is still in L2 (50 MB on an H200) when its turn comes again.
ROTATED_BYTES = 200_000_000
# What one replay reads: long enough that starting the graph does not count.
REPLAY_BYTES = 1_200_000_000
MAX_CALLS = 100


def num_copies(read_bytes: int) -> int:
    """How many copies of `read_bytes` to rotate through."""
    return min(-(-ROTATED_BYTES // max(read_bytes, 1)), MAX_CALLS)


def num_calls(read_bytes: int) -> int:
    """How many calls that read `read_bytes` each to capture in one graph."""
    return min(max(-(-REPLAY_BYTES // max(read_bytes, 1)), 4), MAX_CALLS)


def time_in_graph(calls: Sequence[Callable[[], object]], *, num_replays: int = 7) -> float:
    """Microseconds of one call: the median over replays of a graph of all the calls, run one after the other.

    Each call has run once before the capture, so that it is compiled.
    """
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times_ms = []
    for _ in range(num_replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return median(times_ms) * 1000 / len(calls)
