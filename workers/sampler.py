"""Draws the next token of every row that samples, each by its own sequence's parameters, and appends it to the sequence.

Of several ranks each has the logits of its share of the vocabulary. Where no row has a rule, a filter or log probabilities the
draw is a race that each rank runs over its own share (sharded_sampling.py). Else all logits are brought together, the leader
alone draws, and the others are told. All ranks know of every slot which way it wants.

Of most rows nobody reads the logits: the head leaves their best scores (kernels/head_race.py), and a draw goes on with these.

The parameters of a sequence are written into its slot when it is admitted. In the common case a step costs one
`sample`; rules (bias, penalties, bad words, min_tokens) and log probabilities run only when a row of
the step asked for them. The order of the rules is Hugging Face's.

Shape letters: R rows that sample, V vocabulary, M slots, N rows that want log probabilities, C tokens a sequence can have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..common.requests import TokenLogprob
from ..kernels.drawn import Drawn, SequenceEnds
from ..kernels.logprobs import gather_logprobs
from ..kernels.race import HeadScores, RaceRows
from ..kernels.sampling import sample
from ..kernels.sharded_sampling import pick_winner, race_shard
from ..models.parallel import Share
from ..scheduler.step_plan import AdmittedSequence
from .batch_state import BatchState, DrawRows, SamplingRows
from .comm import RankGroup
from .logit_rules import BadWordsRule, LogitBiasRule, LogitRule, MinTokensRule
from .penalty_rule import PenaltyRule

_NO_LOGPROBS = -1
_PENALTIES = 1  # index of that rule


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens of a step's sampling rows, as tensors; of a graph's draw also those of padding behind them.

    `logits_R` are the drawn tokens' own, after all rules. One that is not finite says that there was no token to draw: the
    model's logits are not finite, or every token is banned.
    """

    drawn: Drawn
    logprobs: SampledLogprobs | None = None

    @property
    def tokens_R(self) -> torch.Tensor:
        return self.drawn.tokens_S

    @property
    def logits_R(self) -> torch.Tensor:
        return self.drawn.logits_S

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Sampled:
        """The same with `function` applied to every tensor."""
        logprobs = self.logprobs.map(function) if self.logprobs else None
        return Sampled(Drawn(function(self.drawn.bits)), logprobs)


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """Log probabilities of the rows `rows_N` (indices into R, on the host), which want `num_top_N` alternatives each."""

    rows_N: np.ndarray
    num_top_N: np.ndarray
    logprob_N: torch.Tensor
    top_ids: torch.Tensor  # [N, largest num_top], likeliest first
    top_logprobs: torch.Tensor
    rank_N: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SampledLogprobs:
        """The same with `function` applied to every tensor."""
        columns = (self.logprob_N, self.top_ids, self.top_logprobs, self.rank_N)
        return SampledLogprobs(self.rows_N, self.num_top_N, *map(function, columns))

    def entries(self, token_ids: list[int]) -> list[TokenLogprob | None]:
        """One entry a row of R, None where none was asked for; `token_ids` are the tokens drawn."""
        entries: list[TokenLogprob | None] = [None] * len(token_ids)
        columns = (self.logprob_N, self.rank_N, self.top_ids, self.top_logprobs)
        on_host = (self.rows_N.tolist(), self.num_top_N.tolist(), *(column.tolist() for column in columns))
        for row, num_top, logprob, rank, ids, values in zip(*on_host, strict=True):
            top = tuple(zip(ids[:num_top], values[:num_top], strict=True))
            entries[row] = TokenLogprob(token_ids[row], logprob, rank, top)
        return entries


class Sampler:
    """The sampling parameters of all slots, and the draw."""

    def __init__(self, batch_state: BatchState, *, vocab: Share, group: RankGroup | None = None) -> None:
        self._vocab = vocab
        # A single tensor rank has the whole vocabulary.
        self._group = group if group is not None and group.place.size > 1 else None
        self._is_follower = group is not None and not group.place.is_leader
        self._state = batch_state
        num_slots, self._to_device, self._fill = len(batch_state.token_ids_MC), batch_state.to_device, batch_state.fill
        self._token_ids_MC = token_ids_MC = batch_state.token_ids_MC
        self._floats_3M = np.zeros((3, num_slots), dtype=np.float32)  # temperature, top_p, min_p
        self._top_k_M = np.zeros(num_slots, dtype=np.int32)
        self._seeds_M = np.zeros(num_slots, dtype=np.int64)
        self._num_logprobs_M = np.full(num_slots, _NO_LOGPROBS, dtype=np.int64)
        self._penalties = PenaltyRule(self._to_device, token_ids_MC, vocab.total)
        self._rules: tuple[LogitRule, ...] = (  # in the order they apply
            LogitBiasRule(self._to_device, num_slots),
            self._penalties,
            BadWordsRule(self._to_device, token_ids_MC),
            MinTokensRule(self._to_device, num_slots),
        )
        self._rule_on = np.zeros((len(self._rules), num_slots), dtype=bool)
        # The device's copies stay where they are, so that a CUDA graph may read them.
        self._tables = (self._floats_3M, self._top_k_M, self._seeds_M)
        self._on_device = tuple(torch.from_numpy(table.copy()).to(batch_state.device) for table in self._tables)
        self._is_stale = True

    def admit(self, sequence: AdmittedSequence) -> None:
        """Writes the sequence's parameters into its slot; the batch state must have its tokens already."""
        slot, sampling = sequence.slot, sequence.request.sampling
        self._floats_3M[:, slot] = sampling.temperature, sampling.top_p, sampling.min_p
        self._top_k_M[slot] = sampling.top_k
        self._seeds_M[slot] = sampling.seed
        temperature, top_p, min_p = self._floats_3M[:, slot]  # as the device has them, which decides by them too
        has_filter = temperature > 0 and (sampling.top_k > 0 or top_p < 1 or min_p > 0)
        has_logprobs = sampling.logprobs is not None
        self._num_logprobs_M[slot] = sampling.logprobs if has_logprobs else _NO_LOGPROBS
        has_rule = any(rule.wants(sampling) for rule in self._rules)
        self._state.wants_logits_M[slot] = has_filter
        self._state.wants_all_logits_M[slot] = has_logprobs or has_rule or (has_filter and self._group is not None)
        for index, rule in enumerate(self._rules):
            if rule.wants(sampling):
                self._rule_on[index, slot] = True
                if not self._is_follower:
                    rule.admit(sequence)
        self._is_stale = True

    def release(self, slot: int) -> None:
        """Forgets what rules keep for the slot."""
        for index in np.flatnonzero(self._rule_on[:, slot]).tolist():
            if not self._is_follower:
                self._rules[index].release(slot)
        self._rule_on[:, slot] = False

    def is_simple(self, slots: np.ndarray) -> bool:
        """Whether `draw_simple` serves sequences in these slots: no rule and no log probabilities, of ranks no filter too."""
        return not self._state.wants_all_logits_M[slots].any()

    def draw(self, logits_RV: torch.Tensor, rows: SamplingRows) -> Sampled:
        """One token a row of float32 logits over the whole vocabulary, which are changed in place."""
        if self._is_follower:
            return self._hear_tokens(rows.on_device)
        sampled = self._draw_here(logits_RV, rows)
        if self._group is not None:
            self._group.broadcast(sampled.tokens_R)
        return sampled

    def _draw_here(self, logits_RV: torch.Tensor, rows: SamplingRows) -> Sampled:
        self.upload()
        num_logprobs_R = self._num_logprobs_M[rows.host_slots_R]
        wanting_N = np.flatnonzero(num_logprobs_R != _NO_LOGPROBS)
        rules_on_KR = self._rule_on[:, rows.host_slots_R]
        has_rules = bool(rules_on_KR.any())
        raw_NV = logits_RV  # a copy only where something is about to change the rows, or where not all rows are wanted
        if len(wanting_N) and (has_rules or len(wanting_N) < len(num_logprobs_R)):
            raw_NV = logits_RV[self._to_device(wanting_N)]
        if has_rules:
            for rule, on_R in zip(self._rules, rules_on_KR, strict=True):
                if on_R.any():
                    rule.apply(logits_RV, rows)
        sampled = self._draw_plain(HeadScores(logits_RV), rows.on_device)
        if has_rules and rules_on_KR[_PENALTIES].any():
            self._penalties.record(rows, sampled.tokens_R)
        if not len(wanting_N):
            return sampled
        num_top_N = num_logprobs_R[wanting_N]
        columns = gather_logprobs(raw_NV, sampled.tokens_R[self._to_device(wanting_N)], int(num_top_N.max()))
        return replace(sampled, logprobs=SampledLogprobs(wanting_N, num_top_N, *columns))

    def upload(self) -> None:
        """Brings parameters that changed to the device."""
        if self._is_stale:
            for table, tensor in zip(self._tables, self._on_device, strict=True):
                self._fill(tensor, table)
            self._is_stale = False

    def race_rows(self, rows: DrawRows) -> RaceRows:
        """What this rank's head wants to know, by uploaded parameters."""
        floats_3M, _, seeds_M = self._on_device
        return RaceRows(floats_3M[0], seeds_M, rows.slots_R, rows.output_positions_R, rows.wants_logits_R)

    def draw_simple(self, own: HeadScores, rows: DrawRows, out: Drawn | None = None) -> Sampled:
        """The draw alone, by uploaded parameters, from this rank's share of the scores. `out`: where it is left.

        Nothing in it depends on the host, so that a CUDA graph can hold it.
        """
        if self._group is None:
            return self._draw_plain(own, rows, out)
        floats_3M, _, seeds_M = self._on_device
        entries_3R = race_shard(
            own.logits_SV,
            temperature_M=floats_3M[0],
            seeds_M=seeds_M,
            slots_S=rows.slots_R,
            positions_S=rows.output_positions_R,
            first_token=self._vocab.start,
            bests=own.bests,
        )
        entries_N3R = self._group.all_gather(entries_3R.flatten()).view(-1, *entries_3R.shape)
        return Sampled(pick_winner(entries_N3R, self._ends(rows), out))

    def _draw_plain(self, scores: HeadScores, rows: DrawRows, out: Drawn | None = None) -> Sampled:
        floats_3M, top_k_M, seeds_M = self._on_device
        drawn = sample(
            scores.logits_SV,
            temperature_M=floats_3M[0],
            top_k_M=top_k_M,
            top_p_M=floats_3M[1],
            min_p_M=floats_3M[2],
            seeds_M=seeds_M,
            slots_S=rows.slots_R,
            positions_S=rows.output_positions_R,
            ends=self._ends(rows),
            bests=scores.bests,
            out=out,
        )
        return Sampled(drawn)

    def _hear_tokens(self, rows: DrawRows) -> Sampled:
        """What the leader draws."""
        assert self._group is not None
        drawn = Drawn(rows.slots_R.new_zeros(3 * len(rows.slots_R), dtype=torch.int32))
        self._group.broadcast(drawn.tokens_S)
        self._ends(rows).append(drawn.tokens_S)
        return Sampled(drawn)

    def _ends(self, rows: DrawRows) -> SequenceEnds:
        return SequenceEnds(self._token_ids_MC, rows.slots_R, rows.lengths_R)
