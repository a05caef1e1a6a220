"""Repetition, presence and frequency penalties: what each penalised sequence has in its prompt and its output, counted.

A sequence takes a row of the tables when it is admitted, filled from its known tokens (after a preemption or a replay these
include outputs); each drawn token is then counted by the device. Sequences without penalties cost nothing. The tables grow
by doubling up to one row a slot.

Shape letters: R rows that sample, V vocabulary, P rows of the tables, M slots, C tokens a sequence can have.
"""

from __future__ import annotations

import numpy as np
import torch

from ..common.requests import TokenSampling
from ..kernels.penalties import apply_penalties, record_tokens
from ..scheduler.step_plan import AdmittedSequence
from .batch_state import SamplingRows
from .logit_rules import ToDevice

_NO_ROW = -1


class PenaltyRule:
    """The penalties of kernels/penalties.py for the slots that ask for any."""

    def __init__(self, to_device: ToDevice, token_ids_MC: torch.Tensor, vocab_size: int) -> None:
        num_slots = len(token_ids_MC)
        self._to_device = to_device
        self._token_ids_MC = token_ids_MC
        self._prompt_mask_PV = torch.zeros((0, vocab_size), dtype=torch.bool, device=token_ids_MC.device)
        self._output_counts_PV = torch.zeros((0, vocab_size), dtype=torch.int32, device=token_ids_MC.device)
        self._free_rows: list[int] = []
        self._table_rows_M = np.full(num_slots, _NO_ROW, dtype=np.int64)
        self._strengths_M3 = np.tile(np.array([1, 0, 0], dtype=np.float32), (num_slots, 1))

    def wants(self, sampling: TokenSampling) -> bool:
        return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)

    def admit(self, sequence: AdmittedSequence) -> None:
        if not self._free_rows:
            self._grow()
        slot, row, sampling = sequence.slot, self._free_rows.pop(), sequence.request.sampling
        self._table_rows_M[slot] = row
        self._strengths_M3[slot] = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        known = self._token_ids_MC[slot, : len(sequence.token_ids)].long()
        prompt, output = known.split([len(known) - sequence.num_output, sequence.num_output])
        self._prompt_mask_PV[row].zero_().index_fill_(0, prompt, True)
        counts = self._output_counts_PV[row].zero_()
        counts.index_put_((output,), torch.ones_like(output, dtype=counts.dtype), accumulate=True)

    def release(self, slot: int) -> None:
        row = int(self._table_rows_M[slot])
        if row != _NO_ROW:
            self._free_rows.append(row)
            self._table_rows_M[slot] = _NO_ROW

    def apply(self, logits_RV: torch.Tensor, rows: SamplingRows) -> None:
        strengths_3R = self._to_device(np.ascontiguousarray(self._strengths_M3[rows.host_slots_R].T))
        apply_penalties(
            logits_RV,
            prompt_mask_RV=self._prompt_mask_PV,
            output_counts_RV=self._output_counts_PV,
            table_rows_S=self._table_rows_R(rows),
            repetition_S=strengths_3R[0],
            presence_S=strengths_3R[1],
            frequency_S=strengths_3R[2],
        )

    def record(self, rows: SamplingRows, tokens_R: torch.Tensor) -> None:
        """Counts one drawn token a row."""
        record_tokens(self._output_counts_PV, self._table_rows_R(rows), tokens_R)

    def _table_rows_R(self, rows: SamplingRows) -> torch.Tensor:
        return self._to_device(self._table_rows_M[rows.host_slots_R])

    def _grow(self) -> None:
        size = len(self._prompt_mask_PV)
        added = min(max(1, size), len(self._table_rows_M) - size)
        assert added > 0, "more penalised sequences than slots"
        self._prompt_mask_PV, self._output_counts_PV = (
            torch.cat((table, table.new_zeros((added, table.shape[1]))))
            for table in (self._prompt_mask_PV, self._output_counts_PV)
        )
        self._free_rows += range(size, size + added)
