"""What a tenant is charged for a sequence: what it is expected to cost when it leaves the queue, what it did cost when it ends.

In milliseconds of a whole replica (scheduler/request_cost.py), on the books of the admission queue.
"""

from __future__ import annotations

from ..scheduler.admission import AdmissionQueue
from ..scheduler.request_cost import request_cost_ms
from ..scheduler.router import Router
from .sequence_state import SequenceState

_OUTPUT_PRIOR_TOKENS = 128.0
_OUTPUT_RATE = 0.05


class Charges:
    """`expected_output_tokens`: the mean length of answers, learned from those that ended by themselves."""

    def __init__(self, router: Router, queue: AdmissionQueue[SequenceState]) -> None:
        self._router = router
        self._queue = queue
        self._kv_capacity_tokens: dict[str, int] = {}
        self.expected_output_tokens = _OUTPUT_PRIOR_TOKENS

    def add_replica(self, name: str, *, kv_capacity_tokens: int) -> None:
        """One that the router knows."""
        self._kv_capacity_tokens[name] = kv_capacity_tokens

    def remove_replica(self, name: str) -> None:
        del self._kv_capacity_tokens[name]

    def tokens_to_come(self, sequence: SequenceState) -> float:
        return min(sequence.request.sampling.max_tokens - len(sequence.output_token_ids), self.expected_output_tokens)

    def answer_ms(self, replica: str) -> float:
        """How long an answer takes there, beside those that run."""
        num_active = max(self._router.num_active(replica), 1)
        return self.expected_output_tokens * self._router.step_times.of(replica).decode_ms(num_active)

    def estimate(self, sequence: SequenceState) -> float:
        """Before it is known where it will run; it is charged when it leaves the queue."""
        sequence.charged_ms = self._expected_ms(sequence, next(iter(self._kv_capacity_tokens), ""), num_cached=0)
        return sequence.charged_ms

    def dispatched(self, sequence: SequenceState, replica: str, *, num_cached: int) -> None:
        """It goes to a replica that has so many tokens of its prompt."""
        self._correct(sequence, self._expected_ms(sequence, replica, num_cached=num_cached))

    def settle(self, sequence: SequenceState, *, num_output: int) -> None:
        """Its run has ended: charge what it really cost there."""
        name, num_cached = sequence.replica, sequence.cached_tokens or 0
        num_active = self._router.num_active(name) + 1
        self._correct(sequence, self._ms(sequence, name, num_cached=num_cached, num_output=num_output, num_active=num_active))

    def learn_length(self, num_output: int) -> None:
        """An answer ended by itself."""
        self.expected_output_tokens += _OUTPUT_RATE * (num_output - self.expected_output_tokens)

    def _expected_ms(self, sequence: SequenceState, replica: str, *, num_cached: int) -> float:
        num_output = len(sequence.output_token_ids) + self.tokens_to_come(sequence)
        num_active = self._router.num_active(replica) if replica in self._kv_capacity_tokens else 1
        return self._ms(sequence, replica, num_cached=num_cached, num_output=num_output, num_active=num_active)

    def _ms(self, sequence: SequenceState, replica: str, *, num_cached: int, num_output: float, num_active: int) -> float:
        """Without replicas, of one whose KV cache holds this request alone."""
        num_prompt = len(sequence.request.prompt_token_ids)
        return request_cost_ms(
            self._router.step_times.of(replica),
            num_prompt=num_prompt,
            num_cached=num_cached,
            num_output=num_output,
            num_active=num_active,
            kv_capacity_tokens=self._kv_capacity_tokens.get(replica) or num_prompt + int(num_output),
        )

    def _correct(self, sequence: SequenceState, cost_ms: float) -> None:
        difference, sequence.charged_ms = cost_ms - sequence.charged_ms, cost_ms
        self._queue.correct(difference, tenant=sequence.stream.tenant.name, priority=sequence.request.priority)
