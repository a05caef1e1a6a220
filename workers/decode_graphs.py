"""CUDA graphs of decode steps: one for each of a ladder of batch sizes, replayed instead of launched kernel by kernel.

A step of n rows that compute one token each runs in the smallest captured size that holds them; the rows behind them are
padding, which reads and writes a slot and a page of its own. Two graphs a size: the forward pass up to this rank's scores, and
the draw that most steps want (Sampler.draw_simple). Other steps are drawn outside, from the first graph's logits. All ranks
capture the same sizes in the same order, with their collectives, and take the same way at each step; data ranks replay the size
that holds the rows of the one that has the most, since their experts meet in it.

What a graph reads lies where it lay at the capture: the columns of the step (copied in while the step before is drawn), the
state of the slots, the sampling tables and the KV cache. All sizes share one memory pool, so the logits of a replay are valid
until the next: what reads them is queued behind it, on the same stream. What is drawn has memory of its own, for it leaves
while the next step runs (side_copies.py). Recorded once, largest first, before the first request.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..kernels.drawn import Drawn
from ..kernels.race import HeadScores
from ..models.causal_lm import CausalLM
from ..scheduler.step_plan import PlannedRow
from .batch_state import BatchState, DrawRows
from .cuda_graphs import GraphRecorder, Replayable
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
        columns: what is to be computed; see BatchState.decode_columns. Read by the first kernel of `forward` alone.
        drawn: what `draw` leaves, in memory that nothing else writes.
    """

    def __init__(self, size: int, *, model: CausalLM, batch_state: BatchState, sampler: Sampler, kv_cache: KvCache) -> None:
        self._model, self._batch_state, self._sampler, self._kv_cache = model, batch_state, sampler, kv_cache
        self.size = size
        self.columns = torch.from_numpy(batch_state.decode_columns((), size)).to(batch_state.device)
        self.drawn = Drawn.empty(size, batch_state.device)

    def forward(self) -> tuple[HeadScores, DrawRows]:
        """This rank's scores of `size` rows, and the rows as the draw wants them. Sampling parameters must be uploaded."""
        batch, rows = self._batch_state.compose_decode(self.columns, self._kv_cache)
        if (data := self._model.data) is not None:
            is_padding_S = rows.slots_R == self._batch_state.padding_slot
            batch = replace(batch, rank_tokens=(self.size,) * data.size, is_padding_T=is_padding_S)
        return self._model.race_own(self._model.forward(batch), self._sampler.race_rows(rows)), rows

    def draw(self, own: HeadScores, rows: DrawRows) -> Sampled:
        """The simple draw."""
        return self._sampler.draw_simple(own, rows, self.drawn)


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A captured DecodeStep: set `columns`, replay `forward`; replay `draw`, read `sampled`; or read `own_logits_SV`."""

    columns: torch.Tensor
    forward: Replayable
    own_logits_SV: torch.Tensor
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
        index = bisect_left(self._sizes, max(num_rows, len(rows)))
        if index == len(self._sizes) or any(row.num_tokens != 1 or not row.samples for row in rows):
            return None
        return self._graphs[self._sizes[index]]


def record_decode_graphs(steps: Sequence[DecodeStep], recorder: GraphRecorder) -> DecodeGraphs:
    """Largest first, so that the others find their memory in the pool."""
    start_s, graphs = time.perf_counter(), {}
    for step in sorted(steps, key=lambda step: step.size, reverse=True):
        graphs[step.size] = _record(step, recorder)
    logger.info("recorded %d graphs of decode steps in %.1f s", len(graphs), time.perf_counter() - start_s)
    return DecodeGraphs(graphs)


def _record(step: DecodeStep, recorder: GraphRecorder) -> DecodeGraph:
    recorder.warm_up(lambda: step.draw(*step.forward()))
    forward, (own, rows) = recorder.record(step.forward)
    draw, sampled = recorder.record(lambda: step.draw(own, rows))
    return DecodeGraph(step.columns, forward, recorder.release(own.logits_SV), rows, draw, sampled)
