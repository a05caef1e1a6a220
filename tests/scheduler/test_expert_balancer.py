"""Rounds of rebalancing over simulated steps: what is measured leads to a better balance, and nothing moves for little."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from pilotfish.common.errors import ConfigError
from pilotfish.scheduler.eplb import ExpertLayout, ExpertPlacement
from pilotfish.scheduler.expert_balancer import ExpertBalancer, expert_layout, first_slots
from pilotfish.scheduler.expert_writes import after_writes

LAYOUT = expert_layout(16, num_redundant=4, num_ranks=4)
FIRST = first_slots(16, num_redundant=4, num_ranks=4)
NUM_LAYERS, INTERVAL = 3, 10


class Ranks:
    """What ranks that follow the orders have in their slots, and how much of `loads` each then computes."""

    def __init__(self, loads: Sequence[Sequence[float]], **settings: float) -> None:
        self.loads = loads
        self.balancer = ExpertBalancer(
            FIRST, LAYOUT, num_layers=NUM_LAYERS, interval_steps=INTERVAL, **{"writes_per_step": 2, **settings}
        )
        self.slots = [list(FIRST) for _ in range(NUM_LAYERS)]
        self.step_id = 0
        self.num_writes = 0

    def run(self, num_steps: int) -> None:
        """Loads come in the step after the one that reads them."""
        for _ in range(num_steps):
            self.step_id += 1
            orders = self.balancer.orders(self.step_id)
            if self.step_id % INTERVAL == 1 and self.step_id > 1:
                self.balancer.observe(self.loads)
            assert (self.step_id % INTERVAL == 0) == (orders is not None and orders.reads_loads)
            if orders is not None:
                self.slots[orders.layer] = after_writes(self.slots[orders.layer], orders.writes)
                self.num_writes += len(orders.writes)
            assert all(set(layer) == set(range(16)) for layer in self.slots)

    def balance(self) -> float:
        placements = [ExpertPlacement.of(LAYOUT, [slots]) for slots in self.slots]
        fullest = sum(max(p.rank_loads(0, loads)) for p, loads in zip(placements, self.loads, strict=True))
        return fullest * LAYOUT.num_ranks / sum(map(sum, self.loads))


def skewed_loads(seed: int) -> list[list[float]]:
    rng = random.Random(seed)
    return [[float(round(100 * rng.paretovariate(1.1))) for _ in range(16)] for _ in range(NUM_LAYERS)]


@pytest.mark.parametrize("seed", range(20))
def test_a_round_evens_out_what_was_measured(seed: int) -> None:
    ranks = Ranks(skewed_loads(seed))
    before = ranks.balance()
    ranks.run(60)
    last = ranks.balancer.last
    assert last is not None
    assert last.measured == pytest.approx(before)
    assert last.expected == pytest.approx(ranks.balance())
    assert last.expected < 0.95 * before
    assert last.num_writes == ranks.num_writes == ranks.balancer.num_writes
    # The next reading says what the round expected, and nothing moves any more.
    assert ranks.balancer.measured == pytest.approx(last.expected)
    assert last.step_id < 30
    for slots in ranks.slots:
        for rank in range(4):
            assert len(set(slots[5 * rank : 5 * rank + 5])) == 5


def test_nothing_moves_for_little() -> None:
    """A layer is touched only where its fullest rank gets lighter by the gain that is asked for."""
    loads = [[1.0] * 16, [1.0] * 15 + [1.3], [1.0] * 15 + [9.0]]
    ranks = Ranks(loads)
    first = list(FIRST)
    ranks.run(40)
    assert ranks.slots[:2] == [first, first]
    assert ranks.slots[2] != first
    assert ranks.balancer.last is not None
    assert ranks.balancer.last.num_layers == 1
    stubborn = Ranks(loads, min_gain=0.9)
    stubborn.run(40)
    assert stubborn.balancer.last is None
    assert stubborn.slots == [first] * 3
    assert stubborn.balancer.measured > 1


def test_old_loads_fade() -> None:
    ranks = Ranks([[9.0] + [1.0] * 15] * NUM_LAYERS)
    ranks.run(30)
    ranks.loads = [[1.0] * 15 + [9.0]] * NUM_LAYERS
    ranks.run(60)
    assert ranks.balancer.measured < 1.2
    assert all(len(where) > 1 for slots in ranks.slots for where in [[s for s, e in enumerate(slots) if e == 15]])


def test_no_tokens_say_nothing() -> None:
    ranks = Ranks([[0.0] * 16] * NUM_LAYERS)
    ranks.run(30)
    assert ranks.balancer.measured == 0
    assert ranks.num_writes == 0


def test_redundant_experts_are_dealt_apart() -> None:
    assert ExpertLayout(num_logical=16, num_physical=20, num_ranks=4) == LAYOUT
    slots = first_slots(16, num_redundant=16, num_ranks=4)
    for lost in range(4):
        assert {expert for slot, expert in enumerate(slots) if slot // 8 != lost} == set(range(16))


@pytest.mark.parametrize(
    ("num_redundant", "num_ranks", "problem"),
    [(0, 3, "use redundant_experts 2"), (3, 4, "use redundant_experts 4"), (20, 2, "use at most 16")],
)
def test_layouts_that_do_not_fit_say_what_would(num_redundant: int, num_ranks: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        expert_layout(16, num_redundant=num_redundant, num_ranks=num_ranks)
