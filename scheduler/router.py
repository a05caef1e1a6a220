"""Which replica takes a request: the one where it costs least, in estimated milliseconds.

    cost = P(queued) + wait + prefill + work_weight * new * prefill + tier_load + decode_weight * E[output] * D(num_active + 1)
    prefill = P(queued + uncached) - P(queued)

P: ms that so many prompt tokens add to a replica's steps; D: ms of a step in which so many sequences decode (step_times.py);
queued: uncached prompt tokens routed there that are not computed yet (the ledger, exact because every request passes here);
wait: until the batch and the KV cache have room; uncached: this prompt less its cached prefix; tier_load: ms to bring cached
blocks from a slower tier; num_active: requests there, of which half are left on average while this one decodes: hence
decode_weight. Cached work is not charged: affinity and load are weighed in one unit, without a mode switch. Replicas within
`tie_ms` of the best count as equal: the one chosen longest ago takes the request. A prompt of which no replica has half goes to
an idle one that costs up to `idle_ms` more, if there is one: else a new replica, which lacks even the prefix that all prompts
share, would get none while others serve.

Computing a prompt costs this request its time, and those that wait behind it and decode beside it the same again
(`work_weight`), unless it serves others too. `new` is the part of the uncached tokens that does not: those outside of a prefix
that requests elsewhere use now, out of a cache. So popular prompts spread over as many replicas as their requests keep busy. A
new prefix that comes many times at once is in no cache yet, and stays together although waiting for it takes as long as
computing it elsewhere.

Binding is late. A replica has room while it could start the request soon: a place in its batch, blocks in its cache, and
prompts for no more than the next steps. Where the cheapest has none, the request is held for it (`Choice.is_held`), charged
there like the others, and routed again when `next_ready` names it. Nothing is held for longer than `hold_ticks` while another
replica has room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

from ..common.errors import Unavailable
from ..common.requests import EngineLoad, StepOutput
from ..common.routing import RouteDecision, RouteScore, RoutingState
from .decision_log import DecisionLog
from .ledger import Account, Ledger
from .replica_trie import ReplicaTrie
from .step_times import StepTime, StepTimes

__all__ = ["Candidate", "Choice", "ReplicaLimits", "ReplicaTrie", "RouteScore", "Router", "RouterConfig", "choose"]

_PRIOR = StepTime.line(10.0, 0.1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """How costs are weighed.

    Attributes:
        work_weight: worth of a millisecond taken from other requests against one of this request.
        decode_weight: worth of a millisecond of decoding against one before the first token.
        tie_ms: costs this close are equal.
        idle_ms: what an idle replica may cost more and still get a prompt that is new to all.
        speculative_ticks: how long a routed prompt counts as cached before the replica says so.
        hold_ticks: how long a request may be held for a replica while another has room.
        max_held: requests held for one replica; the next ones go elsewhere.
        num_steps_ahead: a replica has room while the prompts queued there fill no more steps than this.
        max_decisions: kept for `explain`.
        prior: step time assumed until steps are seen.
    """

    block_size: int
    work_weight: float = 2.0
    decode_weight: float = 0.5
    tie_ms: float = 2.5
    idle_ms: float = 10.0
    speculative_ticks: int = 10_000
    hold_ticks: int = 1_000
    max_held: int = 64
    num_steps_ahead: int = 2
    max_decisions: int = 1024
    prior: StepTime = _PRIOR


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaLimits:
    """What a replica's engine holds at once. `capacity` sequences are sent there, a few more than it runs: a freed place is
    taken in the next step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    capacity: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacity", self.max_num_seqs + max(1, self.max_num_seqs // 8))


class Candidate(NamedTuple):
    """A replica as the cost function sees it.

    `shared_tokens`: of the prompt, the same for all: a prefix that requests use now. `last_chosen`: a counter, lower is longer
    ago.
    """

    replica: str
    step_time: StepTime
    matched_tokens: int = 0
    shared_tokens: int = 0
    queued_tokens: int = 0
    num_active: int = 0
    wait_ms: float = 0.0
    tier_load_ms: float = 0.0
    last_chosen: int = 0
    has_room: bool = True
    may_hold: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """The replica and why: the scores of all candidates, in their order. `is_held`: the request waits here for that replica."""

    replica: str
    scores: tuple[RouteScore, ...]
    is_held: bool = False


def choose(
    candidates: Sequence[Candidate],
    *,
    num_tokens: int,
    expected_output_tokens: float,
    work_weight: float = 1.0,
    decode_weight: float = 1.0,
    tie_ms: float = 1.0,
    idle_ms: float = 1.0,
) -> Choice:
    """The cheapest candidate for a prompt of `num_tokens`, or for a new one an idle candidate that costs little more; of equal
    ones: with room, chosen longest ago, then first in order.

    One that has no room and no place to hold a request is passed over while there is another.

    Raises:
        Unavailable: there is no candidate.
    """
    if not candidates:
        raise Unavailable("no replica can take requests now; try again when `pilotfish status` shows one that is ready")
    decode_steps = decode_weight * expected_output_tokens
    scores = tuple([_score(c, num_tokens, decode_steps, work_weight) for c in candidates])
    costs = [score.cost_ms for score in scores]
    is_open = [c.has_room or c.may_hold for c in candidates]
    limit = min(compress(costs, is_open), default=None)
    if limit is None:
        is_open, limit = [True] * len(costs), min(costs)
    equal = [c for c, cost, open_ in zip(candidates, costs, is_open, strict=True) if cost <= limit + tie_ms and open_]
    if 2 * max([c.matched_tokens for c in candidates]) < num_tokens:
        idle = [c for c, cost in zip(candidates, costs, strict=True) if not c.num_active and cost <= limit + idle_ms]
        equal = idle or equal
    chosen = min(equal, key=lambda c: (not c.has_room, c.last_chosen))
    return Choice(chosen.replica, scores, is_held=not chosen.has_room)


def _score(candidate: Candidate, num_tokens: int, decode_steps: float, work_weight: float) -> RouteScore:
    replica, time, num_matched, num_shared, num_queued, num_active, wait_ms, tier_load_ms, _, has_room, _ = candidate
    queue_ms = time.prompt_ms(num_queued) if num_queued else 0.0
    num_uncached = num_tokens - num_matched if num_tokens > num_matched else 1
    prefill_ms = time.prompt_ms(num_queued + num_uncached) - queue_ms
    work_ms = work_weight * prefill_ms
    if num_shared > num_matched:
        work_ms *= 1.0 - (num_shared - num_matched) / num_uncached
    decode_ms = decode_steps * time.decode_ms(num_active + 1)
    return RouteScore(replica, queue_ms, wait_ms, prefill_ms, work_ms, tier_load_ms, decode_ms, num_matched, has_room)


@dataclass(frozen=True, slots=True)
class _Held:
    """A request that waits for `replica` since a tick."""

    replica: str
    since: int
    hashes: Sequence[bytes]
    num_tokens: int


class Router:
    """Replicas, their index and ledger of requests. Ticks are the caller's (say, milliseconds) and never decrease."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self.trie = ReplicaTrie(speculative_ticks=config.speculative_ticks)
        self.step_times = StepTimes(prior=config.prior)
        self.ledger = Ledger(block_size=config.block_size)
        self._decisions = DecisionLog(max_decisions=config.max_decisions)
        self._limits: dict[str, ReplicaLimits | None] = {}
        self._last_chosen: dict[str, int] = {}
        self._held: dict[str, _Held] = {}
        self._num_choices = 0

    def add_replica(self, replica: str, limits: ReplicaLimits | None = None) -> None:
        """Without limits it always has room."""
        self.trie.add_replica(replica)
        self.ledger.add_replica(replica)
        self._limits[replica] = limits
        self._last_chosen[replica] = 0

    def remove_replica(self, replica: str) -> list[str]:
        """The replica is lost or its engine is a new one; its requests are no longer counted. Returns those held for it."""
        held = self.release_held(replica)
        self.trie.remove_replica(replica)
        self.step_times.forget(replica)
        self.ledger.remove_replica(replica)
        del self._limits[replica], self._last_chosen[replica]
        return held

    def release_held(self, replica: str) -> list[str]:
        """The replica takes nothing new: returns the requests that were held for it, which are to be routed again."""
        held = [request_id for request_id, held in self._held.items() if held.replica == replica]
        for request_id in held:
            self.finish(request_id)
        return held

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
        client_request_id: str = "",
        tenant: str = "",
        may_hold: bool = True,
    ) -> Choice:
        """Choose among `candidates` (default: all), charge the request to the choice and expect its prompt in that cache.

        `hashes` are those of the full blocks of the prompt (`num_tokens` tokens, with outputs known already). A request that is
        routed again leaves its old replica. `client_request_id` is what `explain` finds it by; empty: `request_id`.
        Without `may_hold` the choice takes the request at once, room or not: one that runs there already, say.

        Raises:
            Unavailable: no candidate.
        """
        was_held = self._held.get(request_id)
        self.finish(request_id)
        config, tiers = self._config, tier_load_ms or {}
        may_wait = may_hold and (was_held is None or tick - was_held.since < config.hold_ticks)
        held = _Held(was_held.replica if was_held else "", was_held.since if was_held else tick, hashes, num_tokens)
        names = self._limits if candidates is None else candidates
        matches = self.trie.match(hashes, names, tick=tick)
        num_shared = self._num_shared(hashes, names, matches)
        choice = choose(
            [
                self._candidate(
                    name,
                    held,
                    num_matched=matched,
                    num_shared=num_shared,
                    expected_output_tokens=expected_output_tokens,
                    tier_load_ms=tiers.get(name, 0.0),
                    may_wait=may_wait,
                )
                for name, matched in zip(names, matches, strict=True)
            ],
            num_tokens=num_tokens,
            expected_output_tokens=expected_output_tokens,
            work_weight=config.work_weight,
            decode_weight=config.decode_weight,
            tie_ms=config.tie_ms,
            idle_ms=config.idle_ms,
        )
        is_held = choice.is_held and may_hold
        decision = RouteDecision(
            request_id=client_request_id or request_id,
            sequence_id=request_id,
            tick_ms=tick,
            num_tokens=num_tokens,
            expected_output_tokens=expected_output_tokens,
            replica=choice.replica,
            is_held=is_held,
            scores=choice.scores,
            tenant=tenant,
        )
        self._decisions.add(decision)
        self._num_choices += 1
        self._last_chosen[choice.replica] = self._num_choices
        matched_tokens = decision.chosen.matched_tokens
        self.ledger.open(
            request_id,
            choice.replica,
            hashes=hashes,
            num_tokens=num_tokens,
            matched_tokens=matched_tokens,
            is_held=is_held,
        )
        if is_held:
            self._held[request_id] = _Held(choice.replica, held.since, hashes, num_tokens)
        self.trie.insert_speculative(choice.replica, hashes, tick=tick)
        return Choice(choice.replica, choice.scores, is_held)

    def has_room(self, replica: str) -> bool:
        """Whether it could start some request soon, and none is held for it."""
        return self.ledger.of(replica).num_held == 0 and self.can_start(replica)

    def can_start(self, replica: str) -> bool:
        """Whether a place in its batch is free, and the prompts queued there fill the next steps only."""
        limits = self._limits[replica]
        return limits is None or self._can_start(self.ledger.of(replica), limits)

    def next_ready(self, candidates: Sequence[str], *, tick: int) -> str | None:
        """A held request to be routed again now: the first one of a replica that has room for it, or one held for too long."""
        if not self._held:
            return None
        lines_seen: set[str] = set()
        with_room = [name for name in candidates if self.has_room(name)]
        for request_id, held in self._held.items():
            if held.replica not in lines_seen and held.replica in candidates and self._fits(held.replica, held):
                return request_id
            lines_seen.add(held.replica)
            if tick - held.since >= self._config.hold_ticks and any(self._fits(name, held) for name in with_room):
                return request_id
        return None

    def take_step(self, replica: str, step: StepOutput) -> bool:
        """A replica's report: times, the ledger, cache events. False if events are missing and a snapshot is needed."""
        num_decoding = min(sum(len(o.token_ids) for o in step.sequences if o.offset), step.num_batched_tokens)
        self.step_times.observe(
            replica,
            num_decoding=num_decoding,
            num_prompt_tokens=step.num_batched_tokens - num_decoding,
            step_ms=step.timings.total_ms,
        )
        self.ledger.take_step(replica, step)
        return not step.kv_events or self.trie.apply(replica, first_event_id=step.first_event_id, events=step.kv_events)

    def first_token(self, request_id: str) -> None:
        """The request's prompt is computed: it is no longer queued. An unknown id is ignored: it may just have ended."""
        self.ledger.first_token(request_id)

    def finish(self, request_id: str) -> None:
        """The request has ended or left its replica; an unknown id is ignored."""
        self.ledger.close(request_id)
        self._held.pop(request_id, None)

    def queued_tokens(self, replica: str) -> int:
        """Uncached prompt tokens sent there that are not computed yet."""
        return self.ledger.of(replica).queued_tokens

    def num_active(self, replica: str) -> int:
        """Requests sent there that have not ended."""
        return self.ledger.of(replica).num_sent

    def explain(self, client_request_id: str) -> tuple[RouteDecision, ...]:
        """Every choice made for a request, oldest first, as far back as choices are kept."""
        return self._decisions.of(client_request_id)

    def state(self, replica: str, report: EngineLoad) -> RoutingState:
        """The ledger of a replica beside its last report."""
        account, drift, time = self.ledger.of(replica), self.ledger.drift(replica, report), self.step_times.of(replica)
        return RoutingState(
            num_requests=account.num_sent,
            num_held=account.num_held,
            queued_tokens=account.queued_tokens,
            expected_blocks=account.num_blocks,
            drift_requests=drift.requests,
            drift_tokens=drift.tokens,
            drift_blocks=drift.blocks,
            ms_per_token=time.ms_per_token,
            step_overhead_ms=time.overhead_ms,
            num_indexed_blocks=self.trie.num_blocks(replica),
            num_snapshots=self.trie.num_snapshots(replica),
        )

    def _num_shared(self, hashes: Sequence[bytes], names: Iterable[str], matches: Sequence[int]) -> int:
        """Leading blocks that are in a cache and that a request there uses now: the longest match, if it is such."""
        longest = max(matches, default=0)
        if not longest:
            return 0
        block = hashes[longest - 1]
        is_shared = any(
            matched == longest and block in self.ledger.of(name).prefix_references and self.trie.is_confirmed(name, block)
            for name, matched in zip(names, matches, strict=True)
        )
        return longest if is_shared else 0

    def _candidate(
        self,
        name: str,
        request: _Held,
        *,
        num_matched: int,
        num_shared: int,
        expected_output_tokens: float,
        tier_load_ms: float,
        may_wait: bool,
    ) -> Candidate:
        account, limits, num_tokens = self.ledger.of(name), self._limits[name], request.num_tokens
        num_active = account.num_sent + account.num_held
        wait_ms, has_room = 0.0, True
        if limits is not None and num_active:
            has_room = (request.replica == name or account.num_held == 0) and self._fits(name, request)
            num_blocks = account.num_blocks + self.ledger.num_blocks_for(num_tokens)
            if num_active >= limits.max_num_seqs or num_blocks > limits.num_blocks:
                wait_ms = self._wait_ms(account, limits, name, num_blocks, expected_output_tokens)
                num_active = min(num_active, limits.max_num_seqs - 1)
        return Candidate(
            name,
            self.step_times.of(name),
            min(num_matched * self._config.block_size, num_tokens - 1),
            min(num_shared * self._config.block_size, num_tokens - 1),
            account.queued_tokens + account.held_tokens,
            num_active,
            wait_ms,
            tier_load_ms,
            self._last_chosen[name],
            has_room,
            may_wait and account.num_held < self._config.max_held,
        )

    def _wait_ms(
        self, account: Account, limits: ReplicaLimits, name: str, num_blocks: int, expected_output_tokens: float
    ) -> float:
        """Until as many sequences there have ended as it takes, so that one that makes it `num_blocks` in all has a place and
        blocks; each ends once in its length."""
        if account.num_sent == 0:
            return 0.0
        num_ends = float(account.num_sent + account.num_held + 1 - limits.max_num_seqs)
        num_blocks_over = num_blocks - limits.num_blocks
        if num_blocks_over > 0:
            num_ends = max(num_ends, num_blocks_over * account.num_sent / max(account.num_blocks, 1))
        batch = min(account.num_sent, limits.max_num_seqs)
        return num_ends * expected_output_tokens * self.step_times.of(name).decode_ms(batch) / batch

    def _can_start(self, account: Account, limits: ReplicaLimits) -> bool:
        return (
            account.num_sent < limits.capacity
            and account.queued_tokens < self._config.num_steps_ahead * limits.max_num_batched_tokens
        )

    def _fits(self, replica: str, request: _Held) -> bool:
        """Whether the replica could start this request soon; an idle one always can."""
        account, limits = self.ledger.of(replica), self._limits[replica]
        if limits is None or account.num_sent == 0:
            return True
        if not self._can_start(account, limits):
            return False
        num_held, num_blocks = account.num_blocks, self.ledger.num_blocks_for(request.num_tokens + 1)
        return (
            num_held + num_blocks <= limits.num_blocks
            or num_held + account.num_new_blocks(request.hashes, num_blocks) <= limits.num_blocks
        )
