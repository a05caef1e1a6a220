"""The policy of one step: who computes how many tokens, who is admitted, who gives way.

Order: decode rows, then the running prefill, then admissions, each in the order of the lines (`line_key`). Rules:

- Blocks are taken for the tokens of this step only. Without a free block, cached ones are evicted; then a running sequence
  behind it in line that has no row yet is preempted (`choose_victim`: by priority, then by what its tenant holds); else the row
  waits and keeps what it has, so some row always goes on.
- A prompt longer than what is left of the budget advances by a part, one prompt at a time, and first takes half of the rest
  only: shorter prompts behind it may complete in this step. What they leave it gets at the end.
- A sequence is admitted only if there is room for all of it that is known, and for those that run to grow.
- A waiting sequence that lacks mostly what a running prefill is computing waits for it.
- A head of the line without a place takes that of a running sequence behind it that has a lower priority, chosen likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .block_trie import PrefixMatch
from .giving_way import choose_victim
from .scheduler_config import SchedulerConfig
from .sequence import SequenceState
from .sequence_cache import SequenceCache
from .sequence_lines import SequenceLines
from .step_plan import AdmittedSequence, PlannedRow, StepPlan

_MAX_PASSED = 16  # waiting sequences that one plan may look past
_RESERVED_TOKENS = 16  # growth of each running sequence that an admission leaves room for


@dataclass(slots=True)
class _Draft:
    """A plan being made. `partial` is the long prompt of this step: its tokens so far and the blocks taken for them."""

    step_id: int
    budget: int
    rows: list[PlannedRow] = field(default_factory=list)
    sequences: list[SequenceState] = field(default_factory=list)
    admitted: list[AdmittedSequence] = field(default_factory=list)
    partial: tuple[SequenceState, int, tuple[int, ...]] | None = None

    def add_row(self, sequence: SequenceState, num_tokens: int, new_block_ids: tuple[int, ...]) -> None:
        start, known = sequence.num_computed, sequence.num_known
        end = start + num_tokens
        samples = end == known
        output_position = known - sequence.num_prompt
        self.rows.append(
            PlannedRow(sequence.request_id, sequence.slot, start, num_tokens, samples, new_block_ids, output_position)
        )
        self.sequences.append(sequence)
        self.budget -= num_tokens
        sequence.num_computed = end
        if samples:
            sequence.num_known = known + 1
        sequence.last_step_id = self.step_id


class StepPlanner:
    """Makes plans over the lines and the cache of its scheduler; `fail` ends a sequence that can never fit."""

    def __init__(
        self, config: SchedulerConfig, lines: SequenceLines, cache: SequenceCache, *, fail: Callable[[SequenceState], None]
    ) -> None:
        self._config = config
        self._lines = lines
        self._cache = cache
        self._fail = fail
        self._blocked: SequenceState | None = None  # the head of the line, if the last plan had no place for it
        self.num_preemptions = 0

    def plan(self, step_id: int) -> tuple[StepPlan, list[SequenceState]] | None:
        """The next step and the sequence of each of its rows, or None if nothing can be computed now."""
        self._cache.begin_step(step_id)
        draft = _Draft(step_id, self._config.max_num_batched_tokens)
        self._give_way()
        self._plan_decodes(draft)
        self._plan_running_prefill(draft)
        self._admit(draft)
        self._add_partial(draft)
        if not draft.rows:
            return None
        released, replaced = self._lines.drain_released_slots(), self._cache.drain_replaced()
        return StepPlan(step_id, tuple(draft.admitted), tuple(draft.rows), released, replaced), draft.sequences

    def _plan_decodes(self, draft: _Draft) -> None:
        running, size = self._lines.running, self._config.block_size
        index = 0
        while index < len(running):  # a preemption takes only sequences behind this one
            sequence = running[index]
            known = sequence.num_known
            if known - sequence.num_computed == 1 and known < sequence.max_known:
                new_blocks: tuple[int, ...] | None = ()
                if known > len(sequence.block_ids) * size:
                    new_blocks = self._grow(sequence, 1, draft)
                if new_blocks is not None:
                    draft.add_row(sequence, 1, new_blocks)
                elif sequence.is_finished:
                    continue
            index += 1

    def _plan_running_prefill(self, draft: _Draft) -> None:
        for sequence in self._lines.running:
            if sequence.num_known - sequence.num_computed > 1:
                self._plan_prefill(sequence, draft)
                return  # there is one at most: `_admit` starts no second prompt that it cannot complete

    def _plan_prefill(self, sequence: SequenceState, draft: _Draft) -> None:
        remaining = sequence.num_known - sequence.num_computed
        is_long = remaining > draft.budget
        wanted = (draft.budget + 1) // 2 if is_long else remaining
        room = self._room(sequence)
        num_tokens = min(wanted, room if room > 0 else self._config.block_size)
        new_blocks = self._grow(sequence, num_tokens, draft)
        if new_blocks is None:
            return
        if is_long:
            draft.partial = sequence, num_tokens, new_blocks
            draft.budget -= num_tokens
        else:
            draft.add_row(sequence, num_tokens, new_blocks)

    def _add_partial(self, draft: _Draft) -> None:
        if draft.partial is None:
            return
        sequence, num_tokens, new_blocks = draft.partial
        draft.budget += num_tokens
        num_tokens = min(draft.budget, self._room(sequence))
        more = self._cache.grow(sequence, num_tokens)
        assert more is not None
        draft.add_row(sequence, num_tokens, new_blocks + more)

    def _room(self, sequence: SequenceState) -> int:
        """Tokens it can compute without taking blocks from others."""
        num_blocks = len(sequence.block_ids) + self._cache.num_available
        return num_blocks * self._config.block_size - sequence.num_computed

    def _admit(self, draft: _Draft) -> None:
        waiting = self._lines.waiting
        index = num_passed = 0
        while index < len(waiting) and draft.budget and num_passed < _MAX_PASSED:
            sequence = waiting[index]
            if self._cache.is_in_flight(sequence):  # preempted, and its last token is not known yet
                index += 1
                continue
            if self._cache.num_blocks_for(sequence.num_known) > self._config.num_blocks:
                self._fail(sequence)
                continue
            if not self._lines.has_free_slot:
                self._blocked = sequence
                return
            match = self._cache.match(sequence)
            is_long = sequence.num_known - match.num_tokens > draft.budget
            if (is_long and draft.partial is not None) or self._cache.is_being_extended(sequence, match, self._lines.running):
                self._cache.rollback(match)
                index += 1
                num_passed += 1
                continue
            if not self._has_room(sequence, match):
                self._cache.rollback(match)
                self._blocked = sequence
                return
            self._lines.run(sequence)
            self._cache.enter(sequence, match)
            draft.admitted.append(_admitted(sequence))
            self._plan_prefill(sequence, draft)

    def _has_room(self, sequence: SequenceState, match: PrefixMatch) -> bool:
        missing = self._cache.num_blocks_for(sequence.num_known) - len(match.block_ids)
        reserved = self._cache.num_blocks_for(len(self._lines.running) * _RESERVED_TOKENS)
        return self._cache.num_available >= missing + reserved

    def _would_fit(self, sequence: SequenceState) -> bool:
        match = self._cache.match(sequence)
        has_room = self._has_room(sequence, match)
        self._cache.rollback(match)
        return has_room

    def _grow(self, sequence: SequenceState, num_tokens: int, draft: _Draft) -> tuple[int, ...] | None:
        """Blocks for the next tokens, from others if need be; None if the row must wait or the sequence has ended."""
        while (blocks := self._cache.grow(sequence, num_tokens)) is None:
            if self._cache.num_blocks_for(sequence.num_computed + num_tokens) > self._config.num_blocks:
                if not self._cache.is_in_flight(sequence):  # else its last token may be an end token
                    self._fail(sequence)
                return None
            victim = None if self._cache.is_waiting_for_step else self._victim(sequence, draft)
            if victim is None:
                return None
            self._preempt(victim)
        return blocks

    def _victim(self, sequence: SequenceState, draft: _Draft) -> SequenceState | None:
        running = self._lines.running
        behind = [s for s in running if s.key > sequence.key and s.last_step_id != draft.step_id]
        return choose_victim(behind, running)

    def _give_way(self) -> None:
        head, self._blocked = self._blocked, None
        if head is None or head.is_finished or not self._lines.running:
            return
        if self._lines.has_free_slot and self._would_fit(head):
            return
        running, priority = self._lines.running, head.request.priority
        if running[-1].key < head.key:
            return
        behind = [s for s in running if s.key > head.key and s.request.priority < priority]
        if (victim := choose_victim(behind, running)) is not None:
            self._preempt(victim)

    def _preempt(self, sequence: SequenceState) -> None:
        self._lines.take_out(sequence)
        self._cache.leave(sequence)
        self._lines.wait(sequence)
        self.num_preemptions += 1


def _admitted(sequence: SequenceState) -> AdmittedSequence:
    return AdmittedSequence(
        request=sequence.request,
        slot=sequence.slot,
        token_ids=tuple(sequence.tokens),
        block_ids=tuple(sequence.block_ids),
        num_computed=sequence.num_computed,
        num_output=sequence.num_output,
    )
