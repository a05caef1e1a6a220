"""Which replica takes a request: the one where it costs least, in estimated milliseconds.

    cost = queued * t + (1 + work_weight) * uncached * t + tier_load + decode_weight * E[output] * step(num_active + 1)

t: ms a prompt token takes there; queued: uncached prompt tokens routed there that have no first token yet (a ledger, exact
because every request passes here); uncached: this prompt less its cached prefix; tier_load: ms to bring cached blocks from a
slower tier; step: ms of a decode step with the requests there and this one. Computing a prefix costs this request its time, and
those behind it the same again (`work_weight`): so a burst with one prefix stays together although waiting for the prefix takes
as long as computing it elsewhere. Cached work is not charged: affinity and load are weighed in one unit, without a mode switch.
Replicas within `tie_ms` of the best count as equal: the one chosen longest ago takes the request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..common.errors import Unavailable
from .replica_trie import ReplicaTrie
from .step_times import StepTime, StepTimes

__all__ = ["Candidate", "Choice", "ReplicaTrie", "Router", "RouterConfig", "Score", "choose"]

_PRIOR = StepTime(10.0, 0.1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """How costs are weighed.

    Attributes:
        work_weight: worth of a millisecond taken from later requests against one of this request.
        decode_weight: worth of a millisecond of decoding against one before the first token.
        tie_ms: costs this close are equal.
        speculative_ticks: how long a routed prompt counts as cached before the replica says so.
        prior: step time assumed until steps are seen.
    """

    block_size: int
    work_weight: float = 1.0
    decode_weight: float = 1.0
    tie_ms: float = 1.0
    speculative_ticks: int = 10_000
    prior: StepTime = _PRIOR


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A replica as the cost function sees it. `last_chosen` is a counter, lower is longer ago."""

    replica: str
    step_time: StepTime
    matched_tokens: int = 0
    queued_tokens: int = 0
    num_active: int = 0
    tier_load_ms: float = 0.0
    last_chosen: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The parts of one replica's cost, in milliseconds."""

    replica: str
    queue_ms: float
    prefill_ms: float
    work_ms: float
    tier_load_ms: float
    decode_ms: float
    matched_tokens: int

    @property
    def cost_ms(self) -> float:
        return self.queue_ms + self.prefill_ms + self.work_ms + self.tier_load_ms + self.decode_ms


@dataclass(frozen=True, slots=True)
class Choice:
    """The replica and why: the scores of all candidates, in their order."""

    replica: str
    scores: tuple[Score, ...]


def choose(
    candidates: Sequence[Candidate],
    *,
    num_tokens: int,
    expected_output_tokens: float,
    work_weight: float = 1.0,
    decode_weight: float = 1.0,
    tie_ms: float = 1.0,
) -> Choice:
    """The cheapest candidate for a prompt of `num_tokens`; equal ones: chosen longest ago, then first in order.

    Raises:
        Unavailable: there is no candidate.
    """
    if not candidates:
        raise Unavailable("no replica can take requests now; try again when `pilotfish status` shows one that is ready")
    scores = tuple(_score(c, num_tokens, decode_weight * expected_output_tokens, work_weight=work_weight) for c in candidates)
    limit = min(score.cost_ms for score in scores) + tie_ms
    equal = [c for c, score in zip(candidates, scores, strict=True) if score.cost_ms <= limit]
    return Choice(min(equal, key=lambda c: c.last_chosen).replica, scores)


def _score(candidate: Candidate, num_tokens: int, decode_steps: float, *, work_weight: float) -> Score:
    ms_per_token = candidate.step_time.ms_per_token
    prefill_ms = max(num_tokens - candidate.matched_tokens, 1) * ms_per_token
    return Score(
        replica=candidate.replica,
        queue_ms=candidate.queued_tokens * ms_per_token,
        prefill_ms=prefill_ms,
        work_ms=work_weight * prefill_ms,
        tier_load_ms=candidate.tier_load_ms,
        decode_ms=decode_steps * candidate.step_time.step_ms(candidate.num_active + 1),
        matched_tokens=candidate.matched_tokens,
    )


@dataclass(slots=True)
class _ReplicaLoad:
    queued_tokens: int = 0
    num_active: int = 0
    last_chosen: int = 0


@dataclass(slots=True)
class _Routed:
    """A request on a replica; `queued_tokens` is its share of the ledger, 0 once its prompt is computed."""

    replica: str
    queued_tokens: int


class Router:
    """Replicas, their index and ledger of requests. Ticks are the caller's (say, milliseconds) and never decrease."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self.trie = ReplicaTrie(speculative_ticks=config.speculative_ticks)
        self.step_times = StepTimes(prior=config.prior)
        self._loads: dict[str, _ReplicaLoad] = {}
        self._requests: dict[str, _Routed] = {}
        self._num_choices = 0

    def add_replica(self, replica: str) -> None:
        self.trie.add_replica(replica)
        self._loads[replica] = _ReplicaLoad()

    def remove_replica(self, replica: str) -> None:
        """The replica is lost or its engine is a new one; its requests are no longer counted."""
        self.trie.remove_replica(replica)
        self.step_times.forget(replica)
        del self._loads[replica]
        self._requests = {request_id: r for request_id, r in self._requests.items() if r.replica != replica}

    def route(
        self,
        request_id: str,
        *,
        hashes: Sequence[bytes],
        num_tokens: int,
        expected_output_tokens: float,
        tick: int,
        candidates: Sequence[str] | None = None,
        tier_load_ms: Mapping[str, float] | None = None,
    ) -> Choice:
        """Choose among `candidates` (default: all), charge the request to the choice and expect its prompt in that cache.

        `hashes` are those of the full blocks of the prompt (`num_tokens` tokens, with outputs known already). A request that is
        routed again leaves its old replica.

        Raises:
            Unavailable: no candidate.
        """
        self.finish(request_id)
        config, matches, tiers = self._config, self.trie.match(hashes, tick=tick), tier_load_ms or {}
        choice = choose(
            [
                Candidate(
                    replica=name,
                    step_time=self.step_times.of(name),
                    matched_tokens=min(matches[name] * config.block_size, num_tokens - 1),
                    queued_tokens=self._loads[name].queued_tokens,
                    num_active=self._loads[name].num_active,
                    tier_load_ms=tiers.get(name, 0.0),
                    last_chosen=self._loads[name].last_chosen,
                )
                for name in (self._loads if candidates is None else candidates)
            ],
            num_tokens=num_tokens,
            expected_output_tokens=expected_output_tokens,
            work_weight=config.work_weight,
            decode_weight=config.decode_weight,
            tie_ms=config.tie_ms,
        )
        chosen = next(score for score in choice.scores if score.replica == choice.replica)
        self._num_choices += 1
        routed = _Routed(choice.replica, num_tokens - chosen.matched_tokens)
        self._requests[request_id] = routed
        load = self._loads[choice.replica]
        load.last_chosen = self._num_choices
        load.num_active += 1
        load.queued_tokens += routed.queued_tokens
        self.trie.insert_speculative(choice.replica, hashes, tick=tick)
        return choice

    def first_token(self, request_id: str) -> None:
        """The request's prompt is computed: it is no longer queued. An unknown id is ignored: it may just have ended."""
        routed = self._requests.get(request_id)
        if routed is not None:
            self._loads[routed.replica].queued_tokens -= routed.queued_tokens
            routed.queued_tokens = 0

    def finish(self, request_id: str) -> None:
        """The request has ended or left its replica; an unknown id is ignored."""
        self.first_token(request_id)
        routed = self._requests.pop(request_id, None)
        if routed is not None:
            self._loads[routed.replica].num_active -= 1

    def queued_tokens(self, replica: str) -> int:
        """Uncached prompt tokens routed there without a first token yet."""
        return self._loads[replica].queued_tokens

    def num_active(self, replica: str) -> int:
        """Requests routed there that have not ended."""
        return self._loads[replica].num_active
