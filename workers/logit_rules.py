"""Rules that change logits before a token is drawn: logit_bias, bad words, min_tokens.

A rule keeps entries (a token to change, and when) for the slots that asked for it, in a table that the device has too. It
travels when a sequence with the rule comes or goes; a step reads it there and touches only the rows it concerns, by what
alone the device knows: which row is whose, how many tokens it has, and which were the last.

Shape letters: R rows that sample, V vocabulary, M slots, C tokens a sequence can have, E entries of a rule, K tokens of the
longest bad word but its last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

from ..common.requests import TokenSampling
from ..scheduler.step_plan import AdmittedSequence
from .batch_state import DrawRows, SamplingRows

ToDevice = Callable[[np.ndarray], torch.Tensor]

_NONE = -1


class LogitRule(Protocol):
    """One rule over all slots."""

    def wants(self, sampling: TokenSampling) -> bool:
        """Whether a sequence with this sampling needs the rule."""

    def admit(self, sequence: AdmittedSequence) -> None:
        """Keeps what the rule needs for the sequence's slot, whose tokens the batch state has already."""

    def release(self, slot: int) -> None:
        """Forgets the slot."""

    def apply(self, logits_RV: torch.Tensor, rows: SamplingRows) -> None:
        """Changes, in place, the logits of the rows whose sequences want the rule."""


class SlotEntries:
    """Entries of slots: columns of numbers on the host, and all slots' in one table on the device."""

    def __init__(self, to_device: ToDevice, num_slots: int) -> None:
        self._to_device = to_device
        self._num_slots = num_slots
        self._columns: dict[int, tuple[np.ndarray, ...]] = {}
        self._on_device: tuple[torch.Tensor, ...] | None = None

    def put(self, slot: int, *columns: np.ndarray) -> None:
        """The slot's entries: columns of equal length, the last of them perhaps of several numbers an entry."""
        self._columns[slot] = columns
        self._on_device = None

    def drop(self, slot: int) -> None:
        """Forgets the slot's entries."""
        if self._columns.pop(slot, None) is not None:
            self._on_device = None

    def of_rows(self, rows: DrawRows) -> tuple[torch.Tensor, ...]:
        """The row of each entry, -1 for one whose sequence has none in this step; then the columns. On the device."""
        if self._on_device is None:
            slot_E = np.repeat(list(self._columns), [len(columns[0]) for columns in self._columns.values()])
            columns = (slot_E, *map(_joined, zip(*self._columns.values(), strict=True)))
            self._on_device = tuple(map(self._to_device, columns))
        slot_E, *columns_E = self._on_device
        row_of_slot_M = slot_E.new_full((self._num_slots,), _NONE)
        row_of_slot_M[rows.slots_R] = torch.arange(len(rows.slots_R), device=slot_E.device)
        return row_of_slot_M[slot_E], *columns_E


class LogitBiasRule:
    """logit(v) += bias(v) (OpenAI; Hugging Face's sequence_bias of one token)."""

    def __init__(self, to_device: ToDevice, num_slots: int) -> None:
        self._entries = SlotEntries(to_device, num_slots)

    def wants(self, sampling: TokenSampling) -> bool:
        return bool(sampling.logit_bias)

    def admit(self, sequence: AdmittedSequence) -> None:
        bias = sequence.request.sampling.logit_bias
        self._entries.put(sequence.slot, _ids(bias.keys()), np.array(list(bias.values()), dtype=np.float32))

    def release(self, slot: int) -> None:
        self._entries.drop(slot)

    def apply(self, logits_RV: torch.Tensor, rows: SamplingRows) -> None:
        row_E, id_E, bias_E = self._entries.of_rows(rows.on_device)
        _add(logits_RV, row_E, id_E, bias_E)


class MinTokensRule:
    """End tokens cannot be drawn before min_tokens outputs are there (Hugging Face's min_new_tokens)."""

    def __init__(self, to_device: ToDevice, num_slots: int) -> None:
        self._entries = SlotEntries(to_device, num_slots)

    def wants(self, sampling: TokenSampling) -> bool:
        return sampling.min_tokens > 0 and bool(sampling.end_token_ids)

    def admit(self, sequence: AdmittedSequence) -> None:
        end_ids = _ids(sequence.request.sampling.end_token_ids)
        self._entries.put(sequence.slot, end_ids, np.full_like(end_ids, sequence.request.sampling.min_tokens))

    def release(self, slot: int) -> None:
        self._entries.drop(slot)

    def apply(self, logits_RV: torch.Tensor, rows: SamplingRows) -> None:
        row_E, end_id_E, min_tokens_E = self._entries.of_rows(rows.on_device)
        _ban(logits_RV, row_E, end_id_E, rows.on_device.output_positions_R[row_E] < min_tokens_E)


class BadWordsRule:
    """The last token of a bad word cannot be drawn after its other tokens (Hugging Face's NoBadWords).

    As there, prompt and output both count as what came before, and a word that is just an end token is not a bad word.
    """

    def __init__(self, to_device: ToDevice, token_ids_MC: torch.Tensor) -> None:
        self._token_ids_MC = token_ids_MC
        self._entries = SlotEntries(to_device, len(token_ids_MC))

    def wants(self, sampling: TokenSampling) -> bool:
        return bool(_bad_words(sampling))

    def admit(self, sequence: AdmittedSequence) -> None:
        words = _bad_words(sequence.request.sampling)
        before_EK = np.full((len(words), max(map(len, words)) - 1), _NONE, dtype=np.int64)  # aligned right
        for before_K, word in zip(before_EK, words, strict=True):
            before_K[len(before_K) + 1 - len(word) :] = word[:-1]
        self._entries.put(sequence.slot, _ids(word[-1] for word in words), before_EK)

    def release(self, slot: int) -> None:
        self._entries.drop(slot)

    def apply(self, logits_RV: torch.Tensor, rows: SamplingRows) -> None:
        row_E, last_id_E, before_EK = self._entries.of_rows(rows.on_device)
        slots_R, lengths_R = rows.on_device.slots_R, rows.on_device.lengths_R
        num_before = before_EK.shape[1]
        columns_EK = lengths_R[row_E].unsqueeze(1) - num_before + torch.arange(num_before, device=row_E.device)
        tail_EK = self._token_ids_MC[slots_R[row_E].unsqueeze(1), columns_EK.clamp(min=0)]
        is_there_EK = (before_EK == tail_EK) & (columns_EK >= 0)
        _ban(logits_RV, row_E, last_id_E, (is_there_EK | (before_EK == _NONE)).all(dim=1))


def _add(logits_RV: torch.Tensor, row_E: torch.Tensor, id_E: torch.Tensor, values_E: torch.Tensor) -> None:
    """Adds a value an entry; an entry without a row adds 0 to row 0. No shape depends on the values: nothing is waited for."""
    values_E = values_E.masked_fill(row_E == _NONE, 0.0)
    logits_RV.index_put_((row_E.clamp(min=0), id_E), values_E, accumulate=True)


def _ban(logits_RV: torch.Tensor, row_E: torch.Tensor, id_E: torch.Tensor, is_banned_E: torch.Tensor) -> None:
    bans_E = torch.zeros_like(id_E, dtype=logits_RV.dtype).masked_fill_(is_banned_E, float("-inf"))
    _add(logits_RV, row_E, id_E, bans_E)


def _ids(token_ids: Iterable[int]) -> np.ndarray:
    return np.fromiter(token_ids, dtype=np.int64)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One column of all slots; of entries of several numbers, shorter ones filled up on the left."""
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (width - part.shape[1], 0)), constant_values=_NONE) for part in parts])


def _bad_words(sampling: TokenSampling) -> tuple[tuple[int, ...], ...]:
    return tuple(word for word in sampling.bad_words_ids if len(word) > 1 or word[0] not in sampling.end_token_ids)
