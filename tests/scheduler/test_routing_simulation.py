"""The router in simulated clusters, small and seeded: `benchmarks/simulate_routing.py` has the large ones."""

from __future__ import annotations

from dataclasses import replace

from replica_simulation import ReplicaSizes
from routing_policies import OURS
from simulate_routing import Outcome, means, simulate


def outcome(workload: str, policy: str = OURS, *, max_num_seqs: int = 64, num_seeds: int = 1) -> Outcome:
    """Six replicas, two seconds; the mean of the seeds."""
    sizes = ReplicaSizes(max_num_seqs=max_num_seqs)
    seeds = range(num_seeds)
    (mean,) = means([simulate(workload, policy, num_replicas=6, num_requests=180, seed=seed, sizes=sizes) for seed in seeds])
    return mean


def test_shared_prompts_are_found_and_a_new_one_is_computed_once() -> None:
    ours, prefix = outcome("shared-prompts"), outcome("shared-prompts", "longest-prefix")
    assert ours.hit_rate > 0.98 * prefix.hit_rate  # in longer runs it finds more (docs/performance-routing.md)
    assert ours.ttft_p50_ms < prefix.ttft_p50_ms
    assert ours.ttft_p99_ms < 0.7 * prefix.ttft_p99_ms
    assert ours.busiest_ms < 0.8 * prefix.busiest_ms
    assert ours.copies == 1
    assert prefix.copies > 3


def test_where_batches_are_full_requests_are_held_for_the_replica_that_has_their_prompt() -> None:
    ours = outcome("shared-prompts", max_num_seqs=8)
    prefix = outcome("shared-prompts", "longest-prefix", max_num_seqs=8)
    assert ours.hit_rate > prefix.hit_rate + 0.07
    assert ours.ttft_p99_ms < 0.9 * prefix.ttft_p99_ms


def test_conversations_stay_where_their_history_is() -> None:
    """The first second is the router's prior: later it is no slower at all (docs/performance-routing.md)."""
    ours, prefix = (outcome("multi-turn-chat", policy, num_seeds=2) for policy in (OURS, "longest-prefix"))
    assert ours.hit_rate > 0.99 * prefix.hit_rate
    assert ours.ttft_p50_ms < 1.06 * prefix.ttft_p50_ms
    assert ours.ttft_p99_ms < 1.02 * prefix.ttft_p99_ms
    assert ours.busiest_ms < 1.1 * prefix.busiest_ms


def test_where_nothing_is_shared_load_is_even() -> None:
    ours, turns = outcome("nothing-shared"), outcome("nothing-shared", "round-robin")
    assert ours.ttft_p50_ms < 1.06 * turns.ttft_p50_ms
    assert ours.ttft_p99_ms < 1.02 * turns.ttft_p99_ms
    assert ours.busiest_ms < 1.02 * turns.busiest_ms


def test_a_seed_gives_one_result() -> None:
    first, second, other = (simulate("shared-prompts", OURS, num_replicas=2, num_requests=20, seed=seed) for seed in (3, 3, 4))
    assert replace(first, wall_s=0.0) == replace(second, wall_s=0.0)
    assert first != replace(other, wall_s=first.wall_s)
