"""Routing policies for the simulation: pilotfish's own Router, and three that others use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from pilotfish.common.requests import StepOutput
from pilotfish.scheduler.replica_trie import ReplicaTrie
from pilotfish.scheduler.router import ReplicaLimits, Router, RouterConfig
from replica_simulation import ReplicaSizes, RoutingPolicy, SimulatedRequest

_OUTPUT_PRIOR_TOKENS = 128.0  # as the dispatcher estimates how many tokens a request will bring
_OUTPUT_RATE = 0.05


class PilotfishPolicy:
    """The router of the controller, asked and told as the dispatcher does it."""

    def __init__(self, *, block_size: int) -> None:
        config = RouterConfig(block_size=block_size)
        self.router = Router(config)
        self.hold_ms = float(config.hold_ticks)
        self._replicas: list[str] = []
        self._expected_output_tokens = _OUTPUT_PRIOR_TOKENS

    def add_replica(self, replica: str, sizes: ReplicaSizes) -> None:
        self._replicas.append(replica)
        limits = ReplicaLimits(
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            num_blocks=sizes.num_blocks,
        )
        self.router.add_replica(replica, limits)

    def has_room(self) -> bool:
        return any(map(self.router.has_room, self._replicas))

    def choose(self, request: SimulatedRequest, *, tick: int) -> str | None:
        max_tokens = request.conversation.turns[request.turn].num_output
        choice = self.router.route(
            request.request_id,
            hashes=request.hashes,
            num_tokens=len(request.prompt),
            expected_output_tokens=min(max_tokens, self._expected_output_tokens),
            tick=tick,
            candidates=self._replicas,
        )
        return None if choice.is_held else choice.replica

    def next_ready(self, *, tick: int) -> str | None:
        return self.router.next_ready(self._replicas, tick=tick)

    def take_step(self, replica: str, step: StepOutput) -> None:
        assert self.router.take_step(replica, step), "a cache event is missing"
        for output in step.sequences:
            if output.finish_reason is not None:
                num_tokens = output.offset + len(output.token_ids)
                self._expected_output_tokens += _OUTPUT_RATE * (num_tokens - self._expected_output_tokens)


class _CountingPolicy:
    """Knows how many requests each replica has, and sends it a few more than it runs at once."""

    hold_ms = 0.0

    def __init__(self) -> None:
        self._active: Counter[str] = Counter()
        self._capacity = 0

    def add_replica(self, replica: str, sizes: ReplicaSizes) -> None:
        self._active[replica] = 0
        self._capacity = sizes.max_num_seqs + max(1, sizes.max_num_seqs // 8)

    def has_room(self) -> bool:
        return any(number < self._capacity for number in self._active.values())

    def choose(self, request: SimulatedRequest, *, tick: int) -> str:
        candidates = [name for name, number in self._active.items() if number < self._capacity]
        chosen = self._choose(request, candidates, tick=tick)
        self._active[chosen] += 1
        return chosen

    def next_ready(self, *, tick: int) -> str | None:  # noqa: ARG002 - it holds none
        return None

    def take_step(self, replica: str, step: StepOutput) -> None:
        self._active[replica] -= sum(output.finish_reason is not None for output in step.sequences)

    def _choose(self, request: SimulatedRequest, candidates: Sequence[str], *, tick: int) -> str:  # noqa: ARG002
        """The fewest requests."""
        return min(candidates, key=self._active.__getitem__)


class LeastLoaded(_CountingPolicy):
    """The fewest requests in flight."""


class RoundRobin(_CountingPolicy):
    """One after the other; a full replica is passed over."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -1

    def _choose(self, request: SimulatedRequest, candidates: Sequence[str], *, tick: int) -> str:  # noqa: ARG002
        names = list(self._active)
        order = (names[(self._last + step) % len(names)] for step in range(1, len(names) + 1))
        chosen = next(name for name in order if name in candidates)
        self._last = names.index(chosen)
        return chosen


class LongestPrefix(_CountingPolicy):
    """The longest cached prefix if it is half of the prompt, else the fewest requests; the index is exact and knows no more."""

    def __init__(self) -> None:
        super().__init__()
        self._trie = ReplicaTrie(speculative_ticks=1)

    def add_replica(self, replica: str, sizes: ReplicaSizes) -> None:
        super().add_replica(replica, sizes)
        self._trie.add_replica(replica)

    def _choose(self, request: SimulatedRequest, candidates: Sequence[str], *, tick: int) -> str:
        matches = dict(zip(candidates, self._trie.match(request.hashes, candidates, tick=tick), strict=True))
        longest = max(matches[name] for name in candidates)
        if 2 * longest >= len(request.hashes):
            candidates = [name for name in candidates if matches[name] == longest]
        return super()._choose(request, candidates, tick=tick)

    def take_step(self, replica: str, step: StepOutput) -> None:
        super().take_step(replica, step)
        if step.kv_events:
            assert self._trie.apply(replica, first_event_id=step.first_event_id, events=step.kv_events)


OURS = "pilotfish"
POLICIES: Mapping[str, Callable[[int], RoutingPolicy]] = {
    OURS: lambda block_size: PilotfishPolicy(block_size=block_size),
    "round-robin": lambda _: RoundRobin(),
    "least-loaded": lambda _: LeastLoaded(),
    "longest-prefix": lambda _: LongestPrefix(),
}
