"""Start-time fair queueing: the bound of its paper under random loads, corrections, and no credit for idleness."""

from __future__ import annotations

import random

import pytest
from pilotfish.common.errors import ConfigError
from pilotfish.scheduler.fair_shares import FairShares


def test_flows_are_served_by_weight():
    shares = FairShares({"a": 3.0, "b": 1.0})
    for flow in "ab":
        shares.activate(flow)
    served = ""
    for _ in range(12):
        flow = shares.first("ab")
        shares.charge(flow, 1.0)
        served += flow
    assert (served.count("a"), served.count("b")) == (9, 3)
    with pytest.raises(ConfigError, match="weight of a must be above 0"):
        FairShares({"a": 0.0})


def test_idleness_saves_nothing_up_and_use_of_an_idle_machine_costs_nothing():
    shares = FairShares()
    shares.activate("busy")
    for _ in range(1000):
        shares.charge("busy", 5.0)
    shares.activate("new")
    served = []
    for _ in range(20):
        flow = shares.first(("busy", "new"))
        shares.charge(flow, 5.0)
        served.append(flow)
    assert served.count("new") in (10, 11)


@pytest.mark.parametrize("seed", range(10))
def test_two_flows_that_wait_throughout_differ_by_their_largest_requests(seed):
    """|W_f / w_f - W_g / w_g| <= max_f / w_f + max_g / w_g over every interval in which both wait."""
    rng = random.Random(seed)
    weights = {name: rng.choice((0.5, 1.0, 2.0, 7.0)) for name in "abcd"}
    largest = {name: rng.choice((1.0, 10.0, 400.0)) for name in "abcd"}
    shares = FairShares(weights)
    active: set[str] = set()
    got = dict.fromkeys("abcd", 0.0)
    spread: dict[tuple[str, str], tuple[float, float]] = {}  # lowest and highest difference of a pair since both wait
    for _ in range(4000):
        flow = rng.choice("abcd")
        if rng.random() < 0.05 and len(active) > 1 and flow in active:
            active.discard(flow)
            spread = {pair: value for pair, value in spread.items() if flow not in pair}
        elif rng.random() < 0.1 and flow not in active:
            shares.activate(flow)
            active.add(flow)
            for other in active - {flow}:
                pair = min(flow, other), max(flow, other)
                difference = got[pair[0]] / weights[pair[0]] - got[pair[1]] / weights[pair[1]]
                spread[pair] = difference, difference
        if not active:
            continue
        flow = shares.first(sorted(active))
        cost = rng.uniform(0.1, 1.0) * largest[flow]
        shares.charge(flow, cost)
        got[flow] += cost
        for pair, (low, high) in spread.items():
            f, g = pair
            difference = got[f] / weights[f] - got[g] / weights[g]
            spread[pair] = min(low, difference), max(high, difference)
            bound = largest[f] / weights[f] + largest[g] / weights[g]
            assert spread[pair][1] - spread[pair][0] <= bound + 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_wrong_estimates_are_made_good_when_the_cost_is_known(seed):
    """One tenant's requests cost ten times their estimate; it still gets half, less what is under way."""
    rng = random.Random(seed)
    shares = FairShares()
    for flow in "ab":
        shares.activate(flow)
    under_way: list[tuple[str, float]] = []
    true = dict.fromkeys("ab", 0.0)
    for _ in range(3000):
        flow = shares.first("ab")
        shares.charge(flow, 10.0)
        cost = rng.uniform(50, 150) if flow == "a" else rng.uniform(5, 15)
        true[flow] += cost
        under_way.append((flow, cost))
        if len(under_way) > 8:
            flow, cost = under_way.pop(rng.randrange(8))
            shares.correct(flow, cost - 10.0)
    assert abs(true["a"] - true["b"]) <= 10 * 150
