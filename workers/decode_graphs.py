"""CUDA graphs of decode steps: one for each of a ladder of batch sizes, replayed instead of launched kernel by kernel.

A step of n rows that compute one token each runs in the smallest captured size that holds them; the rows behind them are
padding, which reads and writes a slot and a page of its own. Data ranks replay the size that holds the rows of the one that
has the most, since their experts meet in it. Two graphs a size: the forward pass up to the logits, and the plain draw. Rows
with rules or log probabilities are drawn outside, from the first graph's logits.

What a graph reads lies where it lay at the capture: the columns of the step (copied in before each replay), the state of the
slots, the sampling tables and the KV cache. All sizes share one memory pool, so the logits of a replay are valid until the
next: what reads them is queued behind it, on the same stream. Captured once, largest first, before the first request.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..models.causal_lm import CausalLM
from ..scheduler.step_plan import PlannedRow
from .batch_state import NUM_DECODE_COLUMNS, BatchState, DrawRows
from .kv_cache import KvCache
from .sampler import Sampled, Sampler

logger = logging.getLogger(__name__)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes, ascending: steps of 8 to 64, of an eighth of the size from there, so that padding stays below that."""
    sizes = [1, 2, 4]
    while sizes[-1] < max_num_seqs:
        last = sizes[-1]
        step = 8 if last < 64 else 1 << (last.bit_length() - 4)
        sizes.append(last // step * step + step)
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeStep:
    """A decode step of `size` rows, as work for the device alone. On a CPU it runs as it stands, for tests.

    Attributes:
        columns: what is to be computed, int64 [NUM_DECODE_COLUMNS, size]; see BatchState.decode_columns.
    """

    def __init__(self, size: int, *, model: CausalLM, batch_state: BatchState, sampler: Sampler, kv_cache: KvCache) -> None:
        self._model, self._batch_state, self._sampler, self._kv_cache = model, batch_state, sampler, kv_cache
        self.columns = torch.empty((NUM_DECODE_COLUMNS, size), dtype=torch.int64, device=batch_state.device)
        self.columns.copy_(torch.from_numpy(batch_state.decode_columns((), size)))

    def forward(self) -> tuple[torch.Tensor, DrawRows]:
        """logits [size, V] float32, and the rows as the draw wants them."""
        batch, rows = self._batch_state.compose_decode(self.columns, self._kv_cache)
        if (data := self._model.data) is not None:
            batch = replace(batch, rank_tokens=(len(rows.slots_R),) * data.size, fixed_shapes=True)
        return self._model.compute_logits(self._model.forward(batch)), rows

    def draw(self, logits_SV: torch.Tensor, rows: DrawRows) -> Sampled:
        """The plain draw, and the tokens written behind their sequences."""
        sampled = self._sampler.draw_plain(logits_SV, rows)
        self._batch_state.append_tokens(rows, sampled.tokens_R)
        return sampled


class Replayable(Protocol):
    """A CUDA graph, or in tests of the CPU a function."""

    def replay(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A captured DecodeStep: set `columns`, replay `forward`, read `logits_SV`; replay `draw`, read `sampled`."""

    columns: torch.Tensor
    forward: Replayable
    logits_SV: torch.Tensor
    rows: DrawRows
    draw: Replayable
    sampled: Sampled


class DecodeGraphs:
    """The graphs of one runner, by size."""

    def __init__(self, graphs: Mapping[int, DecodeGraph]) -> None:
        self._graphs = graphs
        self._sizes = sorted(graphs)

    def find(self, rows: Sequence[PlannedRow], *, num_rows: int = 0) -> DecodeGraph | None:
        """The smallest graph that holds a step of these rows, and at least `num_rows`; None where there is none."""
        num_rows = max(num_rows, len(rows))
        if num_rows > self._sizes[-1] or any(row.num_tokens != 1 or not row.samples for row in rows):
            return None
        return self._graphs[self._sizes[bisect_left(self._sizes, num_rows)]]


Capture = Callable[[Sequence[int], Callable[[int], DecodeStep]], DecodeGraphs]


def capture_decode_graphs(sizes: Sequence[int], make_step: Callable[[int], DecodeStep]) -> DecodeGraphs:
    """Captures on the current device."""
    start_s, graphs = time.perf_counter(), {}
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    for size in sorted(sizes, reverse=True):
        graphs[size] = _capture(make_step(size), pool, stream)
    logger.info("captured %d decode graphs of up to %d rows in %.1f s", len(sizes), max(sizes), time.perf_counter() - start_s)
    return DecodeGraphs(graphs)


def _capture(step: DecodeStep, pool: tuple[int, int], stream: torch.cuda.Stream) -> DecodeGraph:
    """Runs the step once as it is, which compiles its kernels, then records it."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.draw(*step.forward())
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # a tensor that is freed during a capture would break it
    forward, draw = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward, pool=pool, stream=stream, capture_error_mode="thread_local"):
        logits_SV, rows = step.forward()
    with torch.cuda.graph(draw, pool=pool, stream=stream, capture_error_mode="thread_local"):
        sampled = step.draw(logits_SV, rows)
    # Held by nobody, so that the next capture's logits can lie in the same place.
    return DecodeGraph(step.columns, forward, torch.as_tensor(_Unowned(logits_SV)), rows, draw, sampled)


class _Unowned:
    """A CUDA tensor's memory without a share in its life."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }
