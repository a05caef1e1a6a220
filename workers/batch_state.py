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

import numpy as np
import torch

from ..kernels.decode_inputs import gather_decode_inputs
from ..models.forward_batch import ForwardBatch
from ..scheduler.step_plan import AdmittedSequence, BlockReplacement, PlannedRow
from .kv_cache import KvCache

_SLOT, _START, _NUM_TOKENS, _SAMPLES, _OUTPUT_POSITION = range(5)
NUM_DECODE_COLUMNS = 3  # slot, position, output position


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The rows of a step that sample, on the host (numpy int64) and on the device."""

    host_slots_R: np.ndarray
    host_output_positions_R: np.ndarray  # the sampled token becomes this output of its sequence
    host_lengths_R: np.ndarray  # tokens known before it, prompt included
    on_device: DrawRows


@dataclass(frozen=True, slots=True)
class DrawRows:
    """What the draw reads of each row that samples: int64 tensors on the device."""

    slots_R: torch.Tensor
    output_positions_R: torch.Tensor
    lengths_R: torch.Tensor

    def first(self, num_rows: int) -> DrawRows:
        """The same without the padding behind `num_rows`."""
        return DrawRows(self.slots_R[:num_rows], self.output_positions_R[:num_rows], self.lengths_R[:num_rows])


class BatchState:
    """The tensors of all slots, and the batches gathered from them."""

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, num_blocks: int, device: torch.device
    ) -> None:
        max_len = min(max_model_len, num_blocks * block_size)
        self.device = device
        self.block_size = block_size
        # One slot more, for the padding of decode steps: its one token is 0 and lies in the scratch page.
        self.padding_slot = max_num_seqs
        num_slots = max_num_seqs + 1
        # One column more: the last token of a full sequence is sampled and written, though never computed.
        self.token_ids_MC = torch.zeros((num_slots, max_len + 1), dtype=torch.int32, device=device)
        self.block_tables_MB = torch.zeros((num_slots, -(-max_len // block_size)), dtype=torch.int32, device=device)
        self._row_numbers = torch.arange(num_slots, dtype=torch.int32, device=device)
        self._num_blocks_M = np.zeros(max_num_seqs, dtype=np.int64)

    def admit(self, sequence: AdmittedSequence) -> None:
        """Fills the sequence's slot with its known tokens and the blocks of its prefix hit."""
        slot, num_blocks = sequence.slot, len(sequence.block_ids)
        token_ids = np.array(sequence.token_ids, dtype=np.int32)
        self.token_ids_MC[slot, : len(token_ids)] = self.to_device(token_ids)
        self.block_tables_MB[slot, :num_blocks] = self.to_device(np.array(sequence.block_ids, dtype=np.int32))
        self._num_blocks_M[slot] = num_blocks

    def update_blocks(self, replaced: Sequence[BlockReplacement], rows: Sequence[PlannedRow]) -> None:
        """Replaces blocks, and appends the rows' new ones to their block tables."""
        entries = [(entry.slot, entry.index, entry.block_id) for entry in replaced]
        for row in rows:
            if row.new_block_ids:
                first = int(self._num_blocks_M[row.slot])
                entries += [(row.slot, first + i, block_id) for i, block_id in enumerate(row.new_block_ids)]
                self._num_blocks_M[row.slot] += len(row.new_block_ids)
        if entries:
            slots, columns, block_ids = self.to_device(np.array(entries, dtype=np.int64)).unbind(1)
            self.block_tables_MB.index_put_((slots, columns), block_ids.int())

    def compose(self, rows: Sequence[PlannedRow], kv_cache: KvCache) -> tuple[ForwardBatch, SamplingRows]:
        """The rows' tokens as one batch, in order, and which of them sample."""
        rows_S5 = np.array(
            [(row.slot, row.start, row.num_tokens, row.samples, row.output_position) for row in rows], dtype=np.int64
        )
        slots_S, starts_S, num_tokens_S = rows_S5[:, _SLOT], rows_S5[:, _START], rows_S5[:, _NUM_TOKENS]
        query_starts_S1 = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(num_tokens_S, out=query_starts_S1[1:])
        context_lens_S = starts_S + num_tokens_S
        slot_T = np.repeat(slots_S, num_tokens_S)
        positions_T = np.arange(query_starts_S1[-1]) + np.repeat(starts_S - query_starts_S1[:-1], num_tokens_S)
        sampling = np.flatnonzero(rows_S5[:, _SAMPLES])
        sampling_slots_R, output_positions_R = rows_S5[sampling, _SLOT], rows_S5[sampling, _OUTPUT_POSITION]
        lengths_R = context_lens_S[sampling]

        # All that the device needs to know travels in one copy.
        token_index_T, table_index_T, offset_T, positions, slots, context_lens, query_starts, *of_sampling = self._pack(
            slot_T * self.token_ids_MC.shape[1] + positions_T,
            slot_T * self.block_tables_MB.shape[1] + positions_T // self.block_size,
            positions_T % self.block_size,
            positions_T,
            slots_S,
            context_lens_S,
            query_starts_S1,
            query_starts_S1[1:][sampling] - 1,
            sampling_slots_R,
            output_positions_R,
            lengths_R,
        )
        logits_rows, *sampling_on_device = of_sampling
        pages_T = self.block_tables_MB.view(-1).index_select(0, table_index_T)
        max_blocks = -(-int(context_lens_S.max()) // self.block_size)
        batch = ForwardBatch(
            token_ids_T=self.token_ids_MC.view(-1).index_select(0, token_index_T).long(),
            positions_T=positions,
            slots_T=torch.add(offset_T, pages_T, alpha=self.block_size),
            block_tables_SB=self.block_tables_MB[:, :max_blocks].index_select(0, slots),
            query_starts_S1=query_starts.int(),
            context_lens_S=context_lens.int(),
            max_query_len=int(num_tokens_S.max()),
            min_query_len=int(num_tokens_S.min()),
            logits_rows_R=logits_rows,
            kv_caches=kv_cache.layers,
        )
        on_device = DrawRows(*sampling_on_device)
        return batch, SamplingRows(sampling_slots_R, output_positions_R, lengths_R, on_device)

    def decode_columns(self, rows: Sequence[PlannedRow], size: int) -> np.ndarray:
        """int64 [NUM_DECODE_COLUMNS, size]: what `compose_decode` wants to know of rows with one token each, and padding."""
        columns = np.zeros((NUM_DECODE_COLUMNS, size), dtype=np.int64)
        columns[0, len(rows) :] = self.padding_slot
        columns[:, : len(rows)] = np.array([(row.slot, row.start, row.output_position) for row in rows], dtype=np.int64).T
        return columns

    def compose_decode(self, columns: torch.Tensor, kv_cache: KvCache) -> tuple[ForwardBatch, DrawRows]:
        """The batch of rows that compute one token each and all sample, made on the device alone.

        The shapes follow from the number of rows and from nothing else, so that a CUDA graph can hold it.
        """
        slots_S, positions_S, output_positions_S = columns.unbind(0)
        inputs = gather_decode_inputs(slots_S, positions_S, self.token_ids_MC, self.block_tables_MB, page_len=self.block_size)
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
        return batch, DrawRows(slots_S, output_positions_S, inputs.lengths_S)

    def compose_padding(self, kv_cache: KvCache) -> ForwardBatch:
        """One token of padding, for a step in which this rank has no rows and others have."""
        return self.compose_decode(self.to_device(self.decode_columns((), 1)), kv_cache)[0]

    def append_tokens(self, rows: DrawRows, tokens_R: torch.Tensor) -> None:
        """Writes sampled tokens behind their sequences, for the next step to read."""
        self.token_ids_MC.index_put_((rows.slots_R, rows.lengths_R), tokens_R.int())

    def _pack(self, *columns: np.ndarray) -> tuple[torch.Tensor, ...]:
        return self.to_device(np.concatenate(columns)).split([len(column) for column in columns])

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """A host array on the device; the copy to a GPU is queued, never waited for."""
        return self._staged(array).to(self.device, non_blocking=True)

    def fill(self, target: torch.Tensor, array: np.ndarray) -> None:
        """The same into a tensor that stays where it is."""
        target.copy_(self._staged(array), non_blocking=True)

    def _staged(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory()
