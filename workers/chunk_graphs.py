"""CUDA graphs of steps with prompt tokens: one for each of a ladder of token counts.

A step's kernels follow from how many tokens and rows it has, not from how its tokens are dealt to rows. So one graph serves
every step of up to its number of tokens: whole prompts, chunks, and decode rows among them. Launching its kernels one by
one takes the host longer than the GPU takes to run them up to a thousand tokens and more.

A step runs in the smallest size that holds it, if padding does not waste too much; the tokens left over are those of a row of
padding. Data ranks replay the size that holds the tokens of the one that has the most, since their experts meet in it; they
have no graph of larger steps than the ladder's, some of which send tokens only where they must, and wait for the device. The
graph ends at the hidden states of the rows that sample: their logits and the draw are launched behind it.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..models.causal_lm import CausalLM
from ..scheduler.step_plan import PlannedRow
from .batch_state import BatchState, DrawRows, StepShape
from .cuda_graphs import GraphRecorder, Replayable
from .kv_cache import KvCache

logger = logging.getLogger(__name__)

_LARGEST_STEP_OF_LADDER = 1024  # tokens: larger steps keep the GPU busy while they are launched
_MAX_WASTE = 4  # of a size, at most one part in so many is padding; not of the smallest sizes
_SMALL = 64


def chunk_sizes(max_num_batched_tokens: int, *, of_data_ranks: bool = False) -> list[int]:
    """Token counts, ascending: quarters of powers of two, and the largest step, which is what a busy engine runs.

    The largest step has none where several data ranks share experts and it is beyond the ladder.
    """
    sizes = [16]
    while sizes[-1] < min(max_num_batched_tokens, _LARGEST_STEP_OF_LADDER):
        sizes.append(sizes[-1] + max(16, 1 << (sizes[-1].bit_length() - 3)))
    if of_data_ranks and max_num_batched_tokens > sizes[-1]:
        return sizes
    return [size for size in sizes if size < max_num_batched_tokens] + [max_num_batched_tokens]


class ChunkStep:
    """A step of `num_tokens` tokens, as work for the device alone. On a CPU it runs as it stands, for tests.

    Attributes:
        shape: with room for any such step, and one row of padding; of data ranks, for any smaller step and as much padding.
        columns: what is to be computed, see BatchState.step_columns.
    """

    def __init__(self, num_tokens: int, *, model: CausalLM, batch_state: BatchState, kv_cache: KvCache) -> None:
        self._model, self._batch_state, self._kv_cache = model, batch_state, kv_cache
        num_rows = min(num_tokens, batch_state.max_num_seqs)
        num_padding_rows = 1 if model.data is None else -(-num_tokens // batch_state.max_len)
        self.shape = StepShape(
            num_tokens=num_tokens,
            num_rows=num_rows + num_padding_rows,
            num_sampling=num_rows,
            max_blocks=batch_state.block_tables_MB.shape[1],
            max_query_len=num_tokens,
            min_query_len=0,
        )
        columns, _ = batch_state.step_columns((), self.shape)
        self.columns = torch.from_numpy(columns).to(batch_state.device)

    def forward(self) -> torch.Tensor:
        """hidden [num_sampling, H]."""
        batch, _ = self._batch_state.compose_columns(self.columns, self.shape, self._kv_cache)
        if (data := self._model.data) is not None:
            is_padding_T = self._batch_state.is_padding(self.columns, self.shape)
            batch = replace(batch, rank_tokens=(self.shape.num_tokens,) * data.size, is_padding_T=is_padding_T)
        return self._model.forward(batch)

    def room(self, num_rows: int) -> int:
        """Tokens of padding that fit behind `num_rows` rows."""
        return (self.shape.num_rows - num_rows) * self._batch_state.max_len

    @property
    def draw_rows(self) -> DrawRows:
        """The rows that sample, the places left among them too."""
        return DrawRows(*(self.columns[place] for place in self.shape.columns[-4:]))


@dataclass(frozen=True, slots=True)
class ChunkGraph:
    """A recorded ChunkStep: set its `columns`, replay, read `hidden_RH`."""

    step: ChunkStep
    forward: Replayable
    hidden_RH: torch.Tensor


class ChunkGraphs:
    """The graphs of one runner, by number of tokens."""

    def __init__(self, graphs: Mapping[int, ChunkGraph]) -> None:
        self._graphs = graphs
        self._sizes = sorted(graphs)

    def find(self, rows: Sequence[PlannedRow], *, num_tokens: int = 0) -> ChunkGraph | None:
        """The smallest graph that holds a step of these rows, and at least `num_tokens`.

        None where there is none, or too much of it would be padding.
        """
        num_own = sum(row.num_tokens for row in rows)
        num_tokens = max(num_tokens, num_own)
        index = bisect_left(self._sizes, num_tokens)
        if index == len(self._sizes):
            return None
        size = self._sizes[index]
        graph, padding = self._graphs[size], size - num_tokens
        wastes_too_much = size > _SMALL and padding * _MAX_WASTE > size
        return None if wastes_too_much or size - num_own > graph.step.room(len(rows)) else graph


def record_chunk_graphs(steps: Sequence[ChunkStep], recorder: GraphRecorder) -> ChunkGraphs:
    """Largest first, so that the others find their memory in the pool."""
    start_s, graphs = time.perf_counter(), {}
    for step in sorted(steps, key=lambda step: step.shape.num_tokens, reverse=True):
        recorder.warm_up(step.forward)
        graph, hidden_RH = recorder.record(step.forward)
        graphs[step.shape.num_tokens] = ChunkGraph(step, graph, recorder.release(hidden_RH))
    logger.info("recorded %d graphs of steps with prompts in %.1f s", len(graphs), time.perf_counter() - start_s)
    return ChunkGraphs(graphs)
