"""Routing policies for the simulation: pilotfish's own Router, and three that others use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from pilotfish.common.requests import KvEvent
from pilotfish.scheduler.replica_trie import ReplicaTrie
from pilotfish.scheduler.router import Router, RouterConfig
from replica_simulation import RoutingPolicy, SimulatedRequest

_OUTPUT_PRIOR_TOKENS = 128.0  # as the dispatcher estimates how many tokens a request will bring
_OUTPUT_RATE = 0.05


class PilotfishPolicy:
    """The router of the controller, told what the dispatcher tells it."""

    def __init__(self, *, block_size: int) -> None:
        self.router = Router(RouterConfig(block_size=block_size))
        self._expected_output_tokens = _OUTPUT_PRIOR_TOKENS

    def add_replica(self, replica: str) -> None:
        self.router.add_replica(replica)

    def choose(self, request: SimulatedRequest, candidates: Sequence[str], *, tick: int) -> str:
        max_tokens = request.conversation.turns[request.turn].num_output
        return self.router.route(
            request.request_id,
            hashes=request.hashes,
            num_tokens=len(request.prompt),
            expected_output_tokens=min(max_tokens, self._expected_output_tokens),
            tick=tick,
            candidates=candidates,
        ).replica

    def first_token(self, request_id: str) -> None:
        self.router.first_token(request_id)

    def finish(self, request: SimulatedRequest) -> None:
        self.router.finish(request.request_id)
        self._expected_output_tokens += _OUTPUT_RATE * (len(request.output) - self._expected_output_tokens)

    def take_step(
        self, replica: str, *, num_tokens: int, step_ms: float, first_event_id: int, events: Sequence[KvEvent]
    ) -> None:
        self.router.step_times.observe(replica, num_tokens=num_tokens, step_ms=step_ms)
        if events:
            assert self.router.trie.apply(replica, first_event_id=first_event_id, events=events)


class _CountingPolicy:
    """Knows how many requests each replica has."""

    def __init__(self) -> None:
        self._active: Counter[str] = Counter()

    def add_replica(self, replica: str) -> None:
        self._active[replica] = 0

    def first_token(self, request_id: str) -> None:
        """Nothing changes."""

    def finish(self, request: SimulatedRequest) -> None:
        self._active[request.replica] -= 1

    def take_step(
        self, replica: str, *, num_tokens: int, step_ms: float, first_event_id: int, events: Sequence[KvEvent]
    ) -> None:
        """Nothing changes."""

    def _least_loaded(self, candidates: Sequence[str]) -> str:
        return min(candidates, key=self._active.__getitem__)


class RoundRobin(_CountingPolicy):
    """One after the other; a full replica is passed over."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -1

    def choose(self, request: SimulatedRequest, candidates: Sequence[str], *, tick: int) -> str:  # noqa: ARG002
        names = list(self._active)
        order = (names[(self._last + step) % len(names)] for step in range(1, len(names) + 1))
        allowed = set(candidates)
        chosen = next(name for name in order if name in allowed)
        self._last = names.index(chosen)
        self._active[chosen] += 1
        return chosen


class LeastLoaded(_CountingPolicy):
    """The fewest requests in flight."""

    def choose(self, request: SimulatedRequest, candidates: Sequence[str], *, tick: int) -> str:  # noqa: ARG002
        chosen = self._least_loaded(candidates)
        self._active[chosen] += 1
        return chosen


class LongestPrefix(_CountingPolicy):
    """The longest cached prefix if it is half of the prompt, else the fewest requests; the index is exact and knows no more."""

    def __init__(self) -> None:
        super().__init__()
        self._trie = ReplicaTrie(speculative_ticks=1)

    def add_replica(self, replica: str) -> None:
        super().add_replica(replica)
        self._trie.add_replica(replica)

    def choose(self, request: SimulatedRequest, candidates: Sequence[str], *, tick: int) -> str:
        matches = self._trie.match(request.hashes, tick=tick)
        longest = max(matches[name] for name in candidates)
        if 2 * longest >= len(request.hashes):
            candidates = [name for name in candidates if matches[name] == longest]
        chosen = self._least_loaded(candidates)
        self._active[chosen] += 1
        return chosen

    def take_step(
        self,
        replica: str,
        *,
        num_tokens: int,  # noqa: ARG002
        step_ms: float,  # noqa: ARG002
        first_event_id: int,
        events: Sequence[KvEvent],
    ) -> None:
        if events:
            assert self._trie.apply(replica, first_event_id=first_event_id, events=events)


OURS = "pilotfish"
POLICIES: Mapping[str, Callable[[int], RoutingPolicy]] = {
    OURS: lambda block_size: PilotfishPolicy(block_size=block_size),
    "round-robin": lambda _: RoundRobin(),
    "least-loaded": lambda _: LeastLoaded(),
    "longest-prefix": lambda _: LongestPrefix(),
}
