"""The router in simulated clusters, small and seeded: `benchmarks/simulate_routing.py` has the large ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from replica_simulation import ReplicaSizes
from routing_policies import OURS, POLICIES
from simulate_routing import Outcome, simulate
from simulated_workloads import WORKLOADS


def outcome(workload: str, policy: str = OURS, *, max_num_seqs: int = 64) -> Outcome:
    """Six replicas, two seconds."""
    sizes = ReplicaSizes(max_num_seqs=max_num_seqs)
    return simulate(workload, policy, num_replicas=6, num_requests=180, seed=0, sizes=sizes)


@pytest.mark.parametrize("max_num_seqs", [64, 8])
def test_shared_prompts_are_computed_where_they_are(max_num_seqs: int) -> None:
    """Small batches are full, and a request is held for the replica that has its prompt."""
    ours = outcome("shared-prompts", max_num_seqs=max_num_seqs)
    prefix = outcome("shared-prompts", "longest-prefix", max_num_seqs=max_num_seqs)
    assert ours.hit_rate > prefix.hit_rate + 0.05
    assert ours.ttft_p99_ms < 0.8 * prefix.ttft_p99_ms
    if max_num_seqs == 64:
        assert ours.copies == 1, "a burst of a new prompt computes it once"
        assert prefix.copies > 3
    else:
        assert ours.hit_rate > prefix.hit_rate + 0.15


def test_conversations_stay_where_their_history_is() -> None:
    ours, prefix = outcome("multi-turn-chat"), outcome("multi-turn-chat", "longest-prefix")
    assert ours.hit_rate > 0.99 * prefix.hit_rate
    assert ours.ttft_p50_ms < 1.02 * prefix.ttft_p50_ms
    assert ours.ttft_p99_ms < 1.02 * prefix.ttft_p99_ms
    assert ours.busiest_ms < 1.02 * prefix.busiest_ms


def test_where_nothing_is_shared_load_is_even() -> None:
    ours, turns = outcome("nothing-shared"), outcome("nothing-shared", "round-robin")
    assert ours.ttft_p50_ms < 1.02 * turns.ttft_p50_ms
    assert ours.ttft_p99_ms < 1.02 * turns.ttft_p99_ms
    assert ours.busiest_ms < 1.02 * turns.busiest_ms


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_gives_one_result(policy: str) -> None:
    workload = next(iter(WORKLOADS))
    first, second, other = (simulate(workload, policy, num_replicas=2, num_requests=20, seed=seed) for seed in (3, 3, 4))
    assert replace(first, wall_s=0.0) == replace(second, wall_s=0.0)
    assert first != replace(other, wall_s=first.wall_s)
