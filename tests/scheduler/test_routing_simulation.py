"""The router in simulated clusters, small and seeded: `benchmarks/simulate_routing.py` has the large ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from routing_policies import OURS, POLICIES
from simulate_routing import Outcome, simulate
from simulated_workloads import WORKLOADS

NUM_REPLICAS = 12
OTHERS = [name for name in POLICIES if name != OURS]


def outcomes(workload: str) -> dict[str, Outcome]:
    return {
        policy: simulate(workload, policy, num_replicas=NUM_REPLICAS, num_requests=60 * NUM_REPLICAS, seed=0)
        for policy in POLICIES
    }


@pytest.fixture(scope="module")
def shared_prompts() -> dict[str, Outcome]:
    return outcomes("shared-prompts")


def test_shared_prompts_are_found_and_nobody_waits_longer(shared_prompts: dict[str, Outcome]) -> None:
    ours = shared_prompts[OURS]
    assert ours.hit_rate > 0.85
    for name in OTHERS:
        other = shared_prompts[name]
        assert ours.hit_rate > other.hit_rate + 0.02, name
        assert ours.ttft_p99_ms < other.ttft_p99_ms, name
        assert ours.goodput >= other.goodput, name


def test_a_burst_of_a_new_prompt_computes_it_once(shared_prompts: dict[str, Outcome]) -> None:
    assert shared_prompts[OURS].copies <= 1.15
    assert all(shared_prompts[name].copies > 2 for name in OTHERS)


def test_conversations_stay_where_their_history_is() -> None:
    chat = outcomes("multi-turn-chat")
    ours, prefix = chat[OURS], chat["longest-prefix"]
    assert ours.hit_rate > 0.98 * prefix.hit_rate
    assert ours.ttft_p50_ms < 1.05 * prefix.ttft_p50_ms
    for name in ("round-robin", "least-loaded"):
        assert ours.hit_rate > 1.5 * chat[name].hit_rate
        assert ours.ttft_p99_ms < chat[name].ttft_p99_ms / 2


def test_where_nothing_is_shared_load_is_even() -> None:
    alone = outcomes("nothing-shared")
    assert all(outcome.hit_rate == 0 for outcome in alone.values())
    assert alone[OURS].imbalance < 1.1
    assert alone[OURS].ttft_p99_ms < 1.02 * min(alone[name].ttft_p99_ms for name in OTHERS)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_seed_gives_one_result(workload: str) -> None:
    first, second = (simulate(workload, OURS, num_replicas=2, num_requests=40, seed=3) for _ in range(2))
    assert replace(first, wall_s=0.0) == replace(second, wall_s=0.0)
    assert first != replace(simulate(workload, OURS, num_replicas=2, num_requests=40, seed=4), wall_s=first.wall_s)
