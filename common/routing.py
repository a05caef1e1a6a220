"""What the router knows of a replica and why it chose one: values that the controller reports and the SDK returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_PARTS = {
    "queue_ms": "prompts queued there",
    "wait_ms": "waiting for a place in its batch or cache",
    "prefill_ms": "computing what its cache lacks",
    "work_ms": "what that takes from others",  # never named alone
    "tier_load_ms": "loading from a slower cache",
    "decode_ms": "decoding in its batch",
}


class RouteScore(NamedTuple):
    """The parts of one replica's cost for a prompt, in milliseconds; the formula is in scheduler/router.py.

    `has_room` is False where the request would have waited: full batch or cache, or prompts enough for the next steps. A tuple,
    because the router makes one for every replica and request.
    """

    replica: str
    queue_ms: float
    wait_ms: float
    prefill_ms: float
    work_ms: float
    tier_load_ms: float
    decode_ms: float
    matched_tokens: int
    has_room: bool = True

    @property
    def cost_ms(self) -> float:
        return self.queue_ms + self.wait_ms + self.prefill_ms + self.work_ms + self.tier_load_ms + self.decode_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteDecision:
    """One choice of the router.

    Attributes:
        request_id: the client's; `sequence_id` names the run of one of its choices on a replica.
        tick_ms: when, in milliseconds of the router's clock, which starts anywhere.
        num_tokens: of the prompt and of outputs known already.
        is_held: the choice had no room, and waiting for it cost less than going elsewhere.
        tenant: whose request it is.
    """

    request_id: str
    sequence_id: str
    tick_ms: int
    num_tokens: int
    expected_output_tokens: float
    replica: str
    is_held: bool
    scores: tuple[RouteScore, ...]
    tenant: str = ""

    @property
    def chosen(self) -> RouteScore:
        return next(score for score in self.scores if score.replica == self.replica)

    def why_not(self, score: RouteScore) -> str:
        """Why the replica of `score` was not chosen; empty for the one that was."""
        chosen = self.chosen
        if score.replica == self.replica:
            return ""
        more_ms = score.cost_ms - chosen.cost_ms
        if more_ms < 0:
            why = (
                "which counts as the same; it was chosen more recently"
                if score.has_room
                else "but it had no room and its line was full"
            )
            return f"{-more_ms:.1f} ms less, {why}"
        differences = {name: getattr(score, name) - getattr(chosen, name) for name in _PARTS}
        differences["prefill_ms"] += differences.pop("work_ms")  # one has the other for its cause
        name = max(differences, key=lambda part: differences[part])
        if differences[name] <= 0:
            return "costs the same; it was chosen more recently"
        return f"{more_ms:.1f} ms more, most of it {_PARTS[name]} (+{differences[name]:.1f} ms)"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingState:
    """The router's ledger of one replica beside what the replica itself last reported: drift is ledger minus report.

    Drift is 0 when the replica is idle. In between it is what is on its way: requests and prompt tokens sent since the report,
    blocks of prompts not computed yet, and up to two blocks a sequence.

    Attributes:
        num_requests: sent there and not ended; `num_held` wait for room there.
        queued_tokens: uncached prompt tokens sent there and not computed yet.
        expected_blocks: of KV cache, for all that was sent there; a shared prefix counts once.
        ms_per_token, step_overhead_ms: the learned cost of a step.
        num_indexed_blocks: known to be in its prefix cache; `num_snapshots` were loaded, of which one is the start.
    """

    num_requests: int = 0
    num_held: int = 0
    queued_tokens: int = 0
    expected_blocks: int = 0
    drift_requests: int = 0
    drift_tokens: int = 0
    drift_blocks: int = 0
    ms_per_token: float = 0.0
    step_overhead_ms: float = 0.0
    num_indexed_blocks: int = 0
    num_snapshots: int = 0
