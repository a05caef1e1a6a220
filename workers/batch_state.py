"""What the device keeps of each running sequence: its tokens and its block table, a row (slot) a sequence.

The scheduler names a slot when it admits a sequence and again when it takes the slot away. In between only changes travel to
the device: new block ids each step, and nothing for tokens, because a sampled token is written here by the device itself
and the next step reads it here. That is why a step can be launched before the host has seen the tokens of the step before.

Shape letters: M slots (max_num_seqs), C tokens a sequence can have, B blocks a sequence can have, S rows of a step, T tokens of
a step, R rows that sample, L tokens a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from ..kernels.decode_inputs import NO_NEW_PAGE, NUM_DECODE_COLUMNS, gather_decode_inputs
from ..models.forward_batch import ForwardBatch
from ..scheduler.step_plan import AdmittedSequence, BlockReplacement, PlannedRow
from .kv_cache import KvCache

_SLOT, _START, _NUM_TOKENS, _SAMPLES, _OUTPUT_POSITION = range(5)
_NO_NEW_PAGES = (NO_NEW_PAGE,)


@dataclass(frozen=True, slots=True)
class DrawRows:
    """What the draw reads of each row that samples: int64 tensors on the device."""

    slots_R: torch.Tensor
    output_positions_R: torch.Tensor  # the sampled token becomes this output of its sequence
    lengths_R: torch.Tensor  # tokens known before it, prompt included
    wants_logits_R: torch.Tensor  # 0 or 1

    def first(self, num_rows: int) -> DrawRows:
        """The same without the padding behind `num_rows`."""
        columns = (self.slots_R, self.output_positions_R, self.lengths_R, self.wants_logits_R)
        return DrawRows(*(column_R[:num_rows] for column_R in columns))


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The rows of a step that sample: on the host (numpy int64) whose they are, and all else on the device."""

    host_slots_R: np.ndarray
    on_device: DrawRows


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """How large the tensors of a step are.

    Attributes:
        num_sampling: rows that sample.
        max_blocks: blocks of the longest row.
        max_query_len, min_query_len: bounds of a row's tokens.
    """

    num_tokens: int
    num_rows: int
    num_sampling: int
    max_blocks: int
    max_query_len: int
    min_query_len: int

    @property
    def columns(self) -> list[slice]:
        """Of BatchState.step_columns: four a token, two a row, where rows begin, five a row that samples.

        Each begins at a multiple of 16 bytes: for other places Triton would compile a kernel anew, in the middle of serving.
        """
        lengths = [self.num_tokens] * 4 + [self.num_rows] * 2 + [self.num_rows + 1] + [self.num_sampling] * 5
        starts = accumulate((length + length % 2 for length in lengths), initial=0)
        return [slice(start, start + length) for start, length in zip(starts, lengths, strict=False)]


class BatchState:
    """The tensors of all slots, and the batches gathered from them.

    Attributes:
        wants_logits_M, wants_all_logits_M: on the host, what the sampler says of a sequence: whether its draw reads its row's
            logits, not only the best score, and whether it reads those of all rows of the step.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        device: torch.device,
        fixed_rows: bool = False,
    ) -> None:
        """`fixed_rows`: steps composed as they come have as many rows as those that CUDA graphs hold, most of them empty. The
        choice of kernels follows from the number of rows, so that all have been compiled at the start.
        """
        self._fixed_rows = fixed_rows
        self.max_len = max_len = min(max_model_len, num_blocks * block_size)
        self.device = device
        self.block_size = block_size
        # One slot more, for the padding of decode steps: its one token is 0 and lies in the scratch page.
        self.max_num_seqs = self.padding_slot = max_num_seqs
        num_slots = max_num_seqs + 1
        # One column more: the last token of a full sequence is sampled and written, though never computed.
        self.token_ids_MC = torch.zeros((num_slots, max_len + 1), dtype=torch.int32, device=device)
        self.block_tables_MB = torch.zeros((num_slots, -(-max_len // block_size)), dtype=torch.int32, device=device)
        self.wants_logits_M, self.wants_all_logits_M = np.zeros((2, num_slots), dtype=bool)
        self._row_numbers = torch.arange(num_slots, dtype=torch.int32, device=device)

    @property
    def most_tokens(self) -> int:
        """Of a step: all sequences as long as can be."""
        return self.max_num_seqs * self.max_len

    def admit(self, sequence: AdmittedSequence) -> None:
        """Fills the sequence's slot with its known tokens and the blocks of its prefix hit."""
        slot, num_blocks = sequence.slot, len(sequence.block_ids)
        token_ids = np.array(sequence.token_ids, dtype=np.int32)
        self.token_ids_MC[slot, : len(token_ids)] = self.to_device(token_ids)
        self.block_tables_MB[slot, :num_blocks] = self.to_device(np.array(sequence.block_ids, dtype=np.int32))

    def wants_logits(self, slots_R: np.ndarray) -> np.ndarray:
        """Of each row that samples in a step, bool."""
        return self.wants_logits_M[slots_R] | self.wants_all_logits_M[slots_R].any()

    def update_blocks(self, replaced: Sequence[BlockReplacement], rows: Sequence[PlannedRow]) -> None:
        """Replaces blocks, and appends the rows' new ones to their block tables. Doing it again changes nothing."""
        entries = [(entry.slot, entry.index, entry.block_id) for entry in replaced]
        for row in rows:
            if row.new_block_ids:
                first = -(-(row.start + row.num_tokens) // self.block_size) - len(row.new_block_ids)
                entries += [(row.slot, first + i, block_id) for i, block_id in enumerate(row.new_block_ids)]
        if entries:
            slots, columns, block_ids = self.to_device(np.array(entries, dtype=np.int64)).unbind(1)
            self.block_tables_MB.index_put_((slots, columns), block_ids.int())

    def compose(self, rows: Sequence[PlannedRow], kv_cache: KvCache) -> tuple[ForwardBatch, SamplingRows]:
        """The rows' tokens as one batch, in order, and which of them sample."""
        shape = self._shape(rows)
        columns, host_slots_R = self.step_columns(rows, shape)
        batch, on_device = self.compose_columns(self.to_device(columns), shape, kv_cache)
        return batch, SamplingRows(host_slots_R, on_device)

    def step_columns(self, rows: Sequence[PlannedRow], shape: StepShape) -> tuple[np.ndarray, np.ndarray]:
        """(what `compose_columns` wants to know, int64 in one array, so that it travels in one copy; the slots of
        the rows that sample).

        Where `shape` has room for more, the rows left compute the tokens left, in the slot and the page of padding, none more
        than a sequence can have; and the first row takes the places left among those that sample.
        """
        rows_S5 = np.zeros((shape.num_rows, 5), dtype=np.int64)
        rows_S5[:, _SLOT] = self.padding_slot
        if rows:
            rows_S5[: len(rows)] = [(row.slot, row.start, row.num_tokens, row.samples, row.output_position) for row in rows]
        num_left_over = shape.num_tokens - int(rows_S5[:, _NUM_TOKENS].sum())
        padding = num_left_over - self.max_len * np.arange(shape.num_rows - len(rows))
        rows_S5[len(rows) :, _NUM_TOKENS] = padding.clip(0, self.max_len)
        slots_S, starts_S, num_tokens_S = rows_S5[:, _SLOT], rows_S5[:, _START], rows_S5[:, _NUM_TOKENS]
        query_starts_S1 = np.zeros(shape.num_rows + 1, dtype=np.int64)
        np.cumsum(num_tokens_S, out=query_starts_S1[1:])
        context_lens_S = starts_S + num_tokens_S
        slot_T = np.repeat(slots_S, num_tokens_S)
        positions_T = np.arange(shape.num_tokens) + np.repeat(starts_S - query_starts_S1[:-1], num_tokens_S)
        sampling = np.flatnonzero(rows_S5[:, _SAMPLES])
        drawn_S3 = (slots_S, rows_S5[:, _OUTPUT_POSITION], context_lens_S)
        padded_R, wants_logits_R = np.zeros((2, shape.num_sampling), dtype=np.int64)
        padded_R[: len(sampling)] = sampling
        wants_logits_R[: len(sampling)] = self.wants_logits(slots_S[sampling])
        columns = (
            slot_T * self.token_ids_MC.shape[1] + positions_T,
            slot_T * self.block_tables_MB.shape[1] + positions_T // self.block_size,
            positions_T % self.block_size,
            positions_T,
            slots_S,
            context_lens_S,
            query_starts_S1,
            query_starts_S1[1:][padded_R] - 1,
            *(column_S[padded_R] for column_S in drawn_S3),
            wants_logits_R,
        )
        places = shape.columns
        array = np.zeros(places[-1].stop, dtype=np.int64)
        for place, column in zip(places, columns, strict=True):
            array[place] = column
        return array, slots_S[sampling]

    def compose_columns(self, columns: torch.Tensor, shape: StepShape, kv_cache: KvCache) -> tuple[ForwardBatch, DrawRows]:
        """The batch of `step_columns`, made on the device alone: what is launched follows from `shape` and nothing else."""
        token_index_T, table_index_T, offset_T, positions, slots, context_lens, query_starts, logits_rows, *of_sampling = (
            columns[place] for place in shape.columns
        )
        pages_T = self.block_tables_MB.view(-1).index_select(0, table_index_T)
        batch = ForwardBatch(
            token_ids_T=self.token_ids_MC.view(-1).index_select(0, token_index_T).long(),
            positions_T=positions,
            slots_T=torch.add(offset_T, pages_T, alpha=self.block_size),
            block_tables_SB=self.block_tables_MB[:, : shape.max_blocks].index_select(0, slots),
            query_starts_S1=query_starts.int(),
            context_lens_S=context_lens.int(),
            max_query_len=shape.max_query_len,
            min_query_len=shape.min_query_len,
            logits_rows_R=logits_rows,
            kv_caches=kv_cache.layers,
        )
        return batch, DrawRows(*of_sampling)

    def is_padding(self, columns: torch.Tensor, shape: StepShape) -> torch.Tensor:
        """Of each token of `step_columns`: bool [T]."""
        token_index_T = columns[: shape.num_tokens]
        return token_index_T >= self.padding_slot * self.token_ids_MC.shape[1]

    def _shape(self, rows: Sequence[PlannedRow]) -> StepShape:
        """The rows' own, without room for more; where rows are fixed, with room for as many as there can be."""
        num_tokens = [row.num_tokens for row in rows]
        if self._fixed_rows:
            return StepShape(
                num_tokens=sum(num_tokens),
                num_rows=self.max_num_seqs + 1,
                num_sampling=sum(row.samples for row in rows),
                max_blocks=self.block_tables_MB.shape[1],
                max_query_len=max(num_tokens),
                min_query_len=0,
            )
        return StepShape(
            num_tokens=sum(num_tokens),
            num_rows=len(rows),
            num_sampling=sum(row.samples for row in rows),
            max_blocks=-(-max(row.start + row.num_tokens for row in rows) // self.block_size),
            max_query_len=max(num_tokens),
            min_query_len=min(num_tokens),
        )

    def decode_columns(self, rows: Sequence[PlannedRow], size: int) -> np.ndarray:
        """int64 [NUM_DECODE_COLUMNS, size]: what `compose_decode` wants to know of rows with one token each, and padding.

        A row's new block, of which its token is the first, is among it.
        """
        columns = np.zeros((NUM_DECODE_COLUMNS, size), dtype=np.int64)
        columns[0, len(rows) :] = self.padding_slot
        columns[-1, len(rows) :] = NO_NEW_PAGE
        if rows:
            columns[:, : len(rows)] = np.array(
                [(row.slot, row.start, row.output_position, 0, *(row.new_block_ids or _NO_NEW_PAGES)) for row in rows],
                dtype=np.int64,
            ).T
            columns[-2, : len(rows)] = self.wants_logits(columns[0, : len(rows)])
        return columns

    def compose_decode(self, columns: torch.Tensor, kv_cache: KvCache) -> tuple[ForwardBatch, DrawRows]:
        """The batch of rows that compute one token each and all sample, made on the device alone; new blocks are appended.

        The shapes follow from the number of rows and from nothing else, so that a CUDA graph can hold it.
        """
        inputs = gather_decode_inputs(columns, self.token_ids_MC, self.block_tables_MB, page_len=self.block_size)
        slots_S, positions_S, output_positions_S, wants_logits_S, _ = inputs.columns_5S.unbind(0)
        batch = ForwardBatch(
            token_ids_T=inputs.token_ids_S,
            positions_T=positions_S,
            slots_T=inputs.cache_slots_S,
            block_tables_SB=inputs.block_tables_SB,
            query_starts_S1=self._row_numbers[: len(slots_S) + 1],
            context_lens_S=inputs.context_lens_S,
            max_query_len=1,
            min_query_len=1,
            logits_rows_R=None,
            kv_caches=kv_cache.layers,
        )
        return batch, DrawRows(slots_S, output_positions_S, inputs.lengths_S, wants_logits_S)

    def compose_padding(self, kv_cache: KvCache) -> ForwardBatch:
        """One token of padding, for a step in which this rank has no rows and others have."""
        return self.compose_decode(self.to_device(self.decode_columns((), 1)), kv_cache)[0]

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """A host array on the device; the copy to a GPU is queued, never waited for."""
        return self._staged(array).to(self.device, non_blocking=True)

    def fill(self, target: torch.Tensor, array: np.ndarray) -> None:
        """The same into a tensor that stays where it is."""
        target.copy_(self._staged(array), non_blocking=True)

    def _staged(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory()
