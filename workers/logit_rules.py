"""Rules that change logits before a token is drawn: logit_bias, bad words, min_tokens.

A rule keeps something for the slots that asked for it and touches only their rows. Nothing waits for the device: which
rows are concerned is known on the host, and whether a bad word is about to be completed is found out by the device, which
alone has the last tokens.

Shape letters: R rows that sample, V vocabulary, M slots, C tokens a sequence can have, W bad words of the rows concerned,
K tokens of the longest bad word but its last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from ..common.requests import TokenSampling
from ..scheduler.step_plan import AdmittedSequence
from .batch_state import SamplingRows

ToDevice = Callable[[np.ndarray], torch.Tensor]


class LogitRule(Protocol):
    """One rule over all slots."""

    def wants(self, sampling: TokenSampling) -> bool:
        """Whether a sequence with this sampling needs the rule."""

    def admit(self, sequence: AdmittedSequence) -> None:
        """Keeps what the rule needs for the sequence's slot, whose tokens the batch state has already."""

    def release(self, slot: int) -> None:
        """Forgets the slot."""

    def apply(self, logits_RV: torch.Tensor, rows: SamplingRows, concerned: np.ndarray) -> None:
        """Changes, in place, the logits of the rows whose indices are in `concerned`."""


class LogitBiasRule:
    """logit(v) += bias(v) (OpenAI; Hugging Face's sequence_bias of one token)."""

    def __init__(self, to_device: ToDevice) -> None:
        self._to_device = to_device
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def wants(self, sampling: TokenSampling) -> bool:
        return bool(sampling.logit_bias)

    def admit(self, sequence: AdmittedSequence) -> None:
        bias = sequence.request.sampling.logit_bias
        ids = self._to_device(np.array(list(bias.keys()), dtype=np.int64))
        self._slots[sequence.slot] = (ids, self._to_device(np.array(list(bias.values()), dtype=np.float32)))

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def apply(self, logits_RV: torch.Tensor, rows: SamplingRows, concerned: np.ndarray) -> None:
        entries = [self._slots[slot] for slot in rows.host_slots_R[concerned].tolist()]
        row_of_entry = self._to_device(np.repeat(concerned, [len(ids) for ids, _ in entries]))
        ids, values = (torch.cat(column) for column in zip(*entries, strict=True))
        logits_RV.index_put_((row_of_entry, ids), values, accumulate=True)


class MinTokensRule:
    """End tokens cannot be drawn before min_tokens outputs are there (Hugging Face's min_new_tokens)."""

    def __init__(self, to_device: ToDevice) -> None:
        self._to_device = to_device
        self._slots: dict[int, tuple[int, np.ndarray]] = {}

    def wants(self, sampling: TokenSampling) -> bool:
        return sampling.min_tokens > 0 and bool(sampling.end_token_ids)

    def admit(self, sequence: AdmittedSequence) -> None:
        sampling = sequence.request.sampling
        self._slots[sequence.slot] = (sampling.min_tokens, np.array(sampling.end_token_ids, dtype=np.int64))

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def apply(self, logits_RV: torch.Tensor, rows: SamplingRows, concerned: np.ndarray) -> None:
        held = []
        for row in concerned.tolist():
            min_tokens, end_ids = self._slots[int(rows.host_slots_R[row])]
            if rows.host_output_positions_R[row] < min_tokens:
                held.append(np.stack((np.full_like(end_ids, row), end_ids)))
        if held:
            row_of_entry, ids = self._to_device(np.concatenate(held, axis=1))
            logits_RV[row_of_entry, ids] = float("-inf")


class BadWordsRule:
    """The last token of a bad word cannot be drawn after its other tokens (Hugging Face's NoBadWords).

    As there, prompt and output both count as what came before, and a word that is just an end token is not a bad word.
    """

    def __init__(self, to_device: ToDevice, token_ids_MC: torch.Tensor) -> None:
        self._to_device = to_device
        self._token_ids_MC = token_ids_MC
        self._slots: dict[int, tuple[tuple[int, ...], ...]] = {}

    def wants(self, sampling: TokenSampling) -> bool:
        return bool(_bad_words(sampling))

    def admit(self, sequence: AdmittedSequence) -> None:
        self._slots[sequence.slot] = _bad_words(sequence.request.sampling)

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def apply(self, logits_RV: torch.Tensor, rows: SamplingRows, concerned: np.ndarray) -> None:
        words: list[tuple[int, tuple[int, ...]]] = []
        for row in concerned.tolist():
            length = rows.host_lengths_R[row]
            words += [(row, word) for word in self._slots[int(rows.host_slots_R[row])] if len(word) <= length + 1]
        if not words:
            return
        # Columns of a word: its row, its last token, the tokens before it, aligned right; -1 where it is shorter than others.
        num_before = max(len(word) for _, word in words) - 1
        packed = np.full((len(words), 2 + num_before), -1, dtype=np.int64)
        for index, (row, word) in enumerate(words):
            packed[index, :2] = row, word[-1]
            packed[index, 2 + num_before - (len(word) - 1) :] = word[:-1]
        on_device = self._to_device(packed)
        row_W, last_W, before_WK = on_device[:, 0], on_device[:, 1], on_device[:, 2:]
        columns_WK = rows.on_device.lengths_R[row_W].unsqueeze(1) - num_before + torch.arange(num_before, device=row_W.device)
        tail_WK = self._token_ids_MC[rows.on_device.slots_R[row_W].unsqueeze(1), columns_WK.clamp(min=0)]
        complete_W = ((before_WK == tail_WK) | (before_WK < 0)).all(dim=1)
        bans_W = torch.zeros_like(complete_W, dtype=logits_RV.dtype).masked_fill_(complete_W, float("-inf"))
        logits_RV.index_put_((row_W, last_W), bans_W, accumulate=True)


def _bad_words(sampling: TokenSampling) -> tuple[tuple[int, ...], ...]:
    return tuple(word for word in sampling.bad_words_ids if len(word) > 1 or word[0] not in sampling.end_token_ids)
