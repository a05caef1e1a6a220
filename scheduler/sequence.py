"""One sequence inside the step scheduler: what is known of it, what is computed, what it holds, and when it ends."""

from __future__ import annotations

from ..common.hashing import root_hash
from ..common.requests import EngineRequest, FinishReason
from .block_trie import TrieNode

NO_SLOT = -1


class SequenceState:
    """Mutable state of one request.

    Every step is the same arithmetic: tokens [num_computed, num_known) are still to compute, and the row that reaches num_known
    samples one more. Both counts run ahead with the plan; `tokens` follows with the result.

    Attributes:
        key: place in line, lower first; never changes (see `line_key`).
        tokens: prompt and outputs that are known by value.
        num_known: len(tokens) plus tokens sampled by steps in flight.
        num_computed: tokens whose keys and values are in the cache once the steps in flight are done.
        max_known: at this many tokens the sequence ends.
        block_ids: its pages, in order, one reference to each.
        hashes: of the full blocks of `tokens`, as far as they were needed yet.
        num_committed: its first blocks that are in the prefix cache; `node` is the last of them.
        is_matchable: False once a block of it could not go into the cache.
        last_step_id: the last plan with a row of it.
        cached_tokens: prompt tokens its first admission found in the cache; None before.
    """

    __slots__ = (
        "block_ids", "cached_tokens", "end_token_ids", "has_reported", "hashes", "is_finished", "is_matchable", "key",
        "last_step_id", "max_known", "node", "num_committed", "num_computed", "num_known", "num_prompt", "request",
        "request_id", "root", "slot", "tokens",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, *, key: tuple[int, int], max_model_len: int) -> None:
        self.request = request
        self.request_id = request.request_id
        self.key = key
        self.num_prompt = len(request.prompt_token_ids)
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_known = len(self.tokens)
        self.num_computed = 0
        self.max_known = min(self.num_prompt + request.sampling.max_tokens, max_model_len)
        self.end_token_ids = frozenset(request.sampling.end_token_ids)
        self.root = root_hash(request.salt)
        self.hashes: list[bytes] = []
        self.block_ids: list[int] = []
        self.node: TrieNode | None = None
        self.num_committed = 0
        self.is_matchable = True
        self.slot = NO_SLOT
        self.last_step_id = 0
        self.cached_tokens: int | None = None
        self.has_reported = False
        self.is_finished = False

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def finish_reason(self) -> FinishReason | None:
        """Whether the last output token ends the sequence. End tokens count only after min_tokens others."""
        num_output = len(self.tokens) - self.num_prompt
        if num_output > self.request.sampling.min_tokens and self.tokens[-1] in self.end_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_known else None


def line_key(priority: int, *, arrival_tick: int, arrival: int, aging_ticks: int) -> tuple[int, int]:
    """A place in line that needs no re-sorting while all requests age.

    A priority that grows by one for every `aging_ticks` of waiting orders any two requests the same way at every tick, so one
    step of priority is worth having arrived `aging_ticks` earlier, and everything is overtaken for a bounded time only.
    `arrival` counts requests and decides ties.
    """
    return arrival_tick - priority * aging_ticks, arrival
