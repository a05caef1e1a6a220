"""An engine's scheduler: requests in, plans out, results in, tokens and cache events out.

No I/O and no clock: the step id is the tick. Life of a sequence: waiting -> running (a slot and blocks) -> finished; a
preempted one gives its blocks up, waits, and later computes prompt and outputs again.

A second plan may be made before the result of the first (two steps in flight at most): then stops are seen one step late, and
what a step computed for a sequence that has ended meanwhile is dropped. `step_planner.py` has the policy.
"""

from __future__ import annotations

from collections import deque

from ..common.errors import InvalidRequest
from ..common.requests import EngineLoad, EngineRequest, FinishReason, KvEvent, SequenceOutput, TokenLogprob
from .scheduler_config import SchedulerConfig
from .sequence import NO_SLOT, SequenceState, line_key
from .sequence_cache import SequenceCache
from .sequence_lines import SequenceLines
from .snapshot import RunningRequest, SchedulerSnapshot
from .step_plan import StepPlan, StepResult
from .step_planner import StepPlanner

__all__ = ["MAX_STEPS_IN_FLIGHT", "SchedulerConfig", "StepScheduler"]

MAX_STEPS_IN_FLIGHT = 2


class StepScheduler:
    """See the module. Not thread-safe: one engine thread owns it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._cache = SequenceCache(config.num_blocks, block_size=config.block_size, prefix_caching=config.prefix_caching)
        self._lines = SequenceLines(config.max_num_seqs)
        self._planner = StepPlanner(config, self._lines, self._cache, fail=self._fail_for_size)
        self._sequences: dict[str, SequenceState] = {}
        self._in_flight: deque[tuple[StepPlan, list[SequenceState]]] = deque()
        self._outputs: list[SequenceOutput] = []
        self._step_id = 0
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence has not ended or a step is in flight."""
        return bool(self._sequences or self._in_flight)

    @property
    def num_waiting(self) -> int:
        return len(self._lines.waiting)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def add(self, request: EngineRequest) -> None:
        """Put a request in line. One that can never run, or whose known outputs end it already, ends at once with an output.

        Raises:
            InvalidRequest: a request of this id has not ended.
        """
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request id {request.request_id!r} is in use; give every request its own")
        config = self.config
        key = line_key(
            request.priority,
            arrival_tick=self._step_id,
            arrival=self._num_added,
            aging_ticks=config.priority_aging_steps,
        )
        self._num_added += 1
        sequence = SequenceState(request, key=key, max_model_len=config.max_model_len)
        self._sequences[request.request_id] = sequence
        self._lines.wait(sequence)
        if not request.prompt_token_ids:
            self._finish(sequence, FinishReason.ERROR, error="the prompt has no tokens")
        elif sequence.num_prompt >= config.max_model_len:
            message = f"the prompt has {sequence.num_prompt} tokens, which leaves no room for output in {config.max_model_len}"
            self._finish(sequence, FinishReason.ERROR, error=message)
        elif reason := sequence.finish_reason():
            self._finish(sequence, reason)
        elif self._cache.num_blocks_for(sequence.num_known) > config.num_blocks:
            self._fail_for_size(sequence)

    def plan(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute before the next `update` or `add`."""
        if len(self._in_flight) >= MAX_STEPS_IN_FLIGHT:
            return None
        planned = self._planner.plan(self._step_id + 1)
        if planned is None:
            return None
        self._in_flight.append(planned)
        self._step_id += 1
        return planned[0]

    def plan_nothing(self) -> StepPlan:
        """A step without rows, of which `update` takes no result: other data ranks have work and this one takes part."""
        self._step_id += 1
        return StepPlan(self._step_id, (), (), ())

    def update(self, result: StepResult) -> None:
        """Take the result of the oldest step in flight.

        Raises:
            ValueError: it is another step's, or has not one token for each sampling row.
        """
        if not self._in_flight or self._in_flight[0][0].step_id != result.step_id:
            expected = self._in_flight[0][0].step_id if self._in_flight else "none"
            raise ValueError(f"result of step {result.step_id}, but the oldest step in flight is {expected}")
        plan, sequences = self._in_flight[0]
        num_sampled = sum(row.samples for row in plan.rows)
        if not num_sampled == len(result.token_ids) == len(result.logprobs):
            counts = f"{len(result.token_ids)} tokens and {len(result.logprobs)} logprobs"
            raise ValueError(f"step {plan.step_id} samples {num_sampled} rows, but its result has {counts}")
        self._in_flight.popleft()
        self._cache.step_done(plan.step_id)
        size, errors = self.config.block_size, result.errors
        sampled = iter(zip(result.token_ids, result.logprobs, strict=True))
        for row, sequence in zip(plan.rows, sequences, strict=True):
            token = next(sampled) if row.samples else None
            if sequence.is_finished:
                continue
            if errors and row.request_id in errors:
                self._finish(sequence, FinishReason.ERROR, error=errors[row.request_id])
                continue
            num_computed = row.start + row.num_tokens
            if num_computed // size > sequence.num_committed and sequence.slot != NO_SLOT:  # a preempted one has no blocks
                self._cache.commit(sequence, num_computed)
            if token is not None:
                self._append(sequence, *token)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a request between steps; False if there is none of this id."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence, reason)
        return True

    def fail(self, request_id: str, message: str) -> bool:
        """End a request with an error; False if there is none of this id."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence, FinishReason.ERROR, error=message)
        return True

    def drain_outputs(self) -> list[SequenceOutput]:
        """What sequences produced since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def drain_kv_events(self) -> tuple[int, tuple[KvEvent, ...]]:
        """Changes of the prefix cache since the last call and the id of the first of them."""
        return self._cache.trie.drain_events()

    def load(self) -> EngineLoad:
        manager, lines = self._cache.manager, self._lines
        remaining = [s.num_known - s.num_computed for s in lines.running]
        return EngineLoad(
            num_running=len(lines.running),
            num_waiting=len(lines.waiting),
            num_free_blocks=manager.num_free,
            num_cached_blocks=manager.num_cached,
            num_used_blocks=manager.num_used,
            queued_tokens=sum(s.num_known for s in lines.waiting) + sum(n for n in remaining if n > 1),
            num_preemptions=self._planner.num_preemptions,
        )

    def snapshot(self) -> SchedulerSnapshot:
        """Everything a new controller must know; events drained later with ids from `next_event_id` on come after it."""
        trie = self._cache.trie
        requests = (
            RunningRequest(s.request_id, s.num_prompt, tuple(s.tokens[s.num_prompt :])) for s in self._sequences.values()
        )
        return SchedulerSnapshot(tuple(requests), trie.stored_blocks(), trie.next_event_id)

    def check_invariants(self) -> None:
        """Raise AssertionError if any count, line, reference or link disagrees with another; for tests, after every step."""
        lines = self._lines
        lines.check_invariants()
        self._cache.check_invariants(lines.running)
        alive = {id(s) for s in self._sequences.values()}
        assert alive == {id(s) for s in [*lines.running, *lines.waiting]}
        assert not any(s.is_finished for s in self._sequences.values())
        assert len(self._in_flight) <= MAX_STEPS_IN_FLIGHT
        assert sum(s.num_known - s.num_computed > 1 for s in lines.running) <= 1, "two prefills are under way"
        for sequence in lines.running:
            assert len(sequence.block_ids) == self._cache.num_blocks_for(sequence.num_computed)
            assert sequence.num_computed <= sequence.num_known <= sequence.max_known
            num_pending = sum(
                row.samples for plan, rows in self._in_flight for row, s in zip(plan.rows, rows, strict=True) if s is sequence
            )
            assert sequence.num_known == len(sequence.tokens) + num_pending

    def _append(self, sequence: SequenceState, token_id: int, logprob: TokenLogprob | None) -> None:
        sequence.tokens.append(token_id)
        logprobs = () if logprob is None else (logprob,)
        self._emit(sequence, sequence.finish_reason(), token_ids=(token_id,), logprobs=logprobs)

    def _finish(self, sequence: SequenceState, reason: FinishReason, *, error: str = "") -> None:
        self._emit(sequence, reason, error=error)

    def _fail_for_size(self, sequence: SequenceState) -> None:
        config = self.config
        message = (
            f"the sequence has {sequence.num_known} tokens ({sequence.num_prompt} of them prompt), which do not fit in the KV "
            f"cache of {config.num_blocks * config.block_size}: shorten the prompt, lower max_tokens, or serve with more KV "
            "cache (kv_memory_fraction or num_kv_blocks)"
        )
        self._finish(sequence, FinishReason.ERROR, error=message)

    def _emit(
        self,
        sequence: SequenceState,
        reason: FinishReason | None,
        *,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str = "",
    ) -> None:
        output = SequenceOutput(
            request_id=sequence.request_id,
            offset=sequence.num_output - len(token_ids),
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            cached_tokens=0 if sequence.has_reported else sequence.cached_tokens or 0,
            error=error,
        )
        self._outputs.append(output)
        sequence.has_reported = True
        if reason is not None:
            sequence.is_finished = True
            del self._sequences[sequence.request_id]
            self._lines.take_out(sequence)
            self._cache.leave(sequence)
