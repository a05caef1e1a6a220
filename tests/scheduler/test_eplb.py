"""Expert placement against brute force on small cases, and what must hold on large ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
from pilotfish.scheduler.eplb import (
    ExpertLayout,
    ExpertPlacement,
    count_replicas,
    place_experts,
    rebalance_experts,
)
from pilotfish.scheduler.expert_packing import Packs

DEEPSEEK = ExpertLayout(num_logical=256, num_physical=288, num_ranks=32, num_nodes=4, num_groups=8)


def random_loads(rng: random.Random, num_layers: int, num_experts: int) -> list[list[float]]:
    """Skewed as real ones are, or with many ties."""
    draw = rng.choice((lambda: rng.paretovariate(1.2), lambda: float(rng.randrange(4)), lambda: 1.0 + rng.random()))
    return [[draw() for _ in range(num_experts)] for _ in range(num_layers)]


def random_layout(rng: random.Random) -> ExpertLayout:
    while True:
        num_ranks, slots = rng.randint(1, 8), rng.randint(1, 6)
        try:
            return ExpertLayout(
                num_logical=rng.randint(1, 24),
                num_physical=num_ranks * slots,
                num_ranks=num_ranks,
                num_nodes=rng.choice((1, 2, 3)),
                num_groups=rng.choice((1, 2, 3, 4, 6)),
                min_replicas=rng.choice((1, 1, 2)),
            )
        except ValueError:
            continue


def check(placement: ExpertPlacement) -> None:
    """Both maps agree, every expert is there, its copies are on different ranks, and groups stay on their nodes."""
    layout = placement.layout
    for experts, where in zip(placement.physical_to_logical, placement.logical_to_physical, strict=True):
        assert len(experts) == layout.num_physical
        assert len(where) == layout.num_logical
        assert sorted(itertools.chain(*where)) == list(range(layout.num_physical))
        for expert, slots in enumerate(where):
            assert len(slots) >= layout.min_replicas
            assert all(experts[slot] == expert for slot in slots)
            assert len({slot // layout.slots_per_rank for slot in slots}) == len(slots)
            assert list(slots) == sorted(slots)
        if layout.num_groups % layout.num_nodes == 0:
            node_slots = layout.num_physical // layout.num_nodes
            for first in range(0, layout.num_logical, layout.group_size):
                group = where[first : first + layout.group_size]
                assert len({slot // node_slots for slots in group for slot in slots}) == 1


def compositions(total: int, parts: int, least: int, most: int) -> Iterator[tuple[int, ...]]:
    for counts in itertools.product(range(least, most + 1), repeat=parts):
        if sum(counts) == total:
            yield counts


@pytest.mark.parametrize("seed", range(60))
def test_replica_counts_are_the_best_there_are(seed: int) -> None:
    rng = random.Random(seed)
    num_experts, most, least = rng.randint(1, 5), rng.randint(2, 4), rng.choice((1, 2))
    num_physical = rng.randint(num_experts * least, num_experts * most)
    (loads,) = random_loads(rng, 1, num_experts)
    counts = count_replicas(loads, num_physical=num_physical, max_replicas=most, min_replicas=least)
    assert sum(counts) == num_physical
    assert all(least <= count <= most for count in counts)
    best = min(
        max(load / count for load, count in zip(loads, other, strict=True))
        for other in compositions(num_physical, num_experts, least, most)
    )
    assert max(load / count for load, count in zip(loads, counts, strict=True)) == best


def best_max_load(copies: Sequence[int], weights: Sequence[float], num_packs: int, num_slots: int) -> float:
    """Over all ways to deal the copies into packs, with no item twice in one."""
    best = float("inf")
    packs: list[list[int]] = [[] for _ in range(num_packs)]

    def deal(index: int) -> None:
        nonlocal best
        if index == len(copies):
            best = min(best, max(sum(weights[item] for item in pack) for pack in packs))
            return
        tried = []
        for pack in packs:
            if len(pack) < num_slots and copies[index] not in pack and sorted(pack) not in tried:
                tried.append(sorted(pack))
                pack.append(copies[index])
                deal(index + 1)
                pack.pop()

    deal(0)
    return best


@pytest.mark.parametrize("seed", range(150))
def test_packing_is_near_the_best_there_is(seed: int) -> None:
    rng = random.Random(seed)
    num_packs, num_slots = rng.choice(((2, 2), (2, 4), (3, 2), (3, 3), (4, 2)))
    num_items = rng.randint(num_slots, num_packs * num_slots)
    (loads,) = random_loads(rng, 1, num_items)
    counts = count_replicas(loads, num_physical=num_packs * num_slots, max_replicas=num_packs)
    weights = [load / count for load, count in zip(loads, counts, strict=True)]
    packs = Packs(num_packs, num_slots, weights)
    packs.fill(counts)
    copies = [item for item, count in enumerate(counts) for _ in range(count)]
    assert sorted(itertools.chain(*packs.slots)) == copies
    assert all(len(set(slots)) == num_slots for slots in packs.slots)
    assert packs.loads == pytest.approx([sum(weights[item] for item in slots) for slots in packs.slots])
    best = best_max_load(copies, weights, num_packs, num_slots)
    assert best - 1e-9 <= packs.max_load <= best * 4 / 3 + 1e-9  # Graham's bound of LPT (1969), which knows no limit of items
    packs.balance(best)
    assert best - 1e-9 <= packs.max_load <= best * 1.1 + 1e-9


def test_a_copy_that_fits_nowhere_makes_room() -> None:
    """The only pack with room has the item already, and the other is full."""
    packs = Packs(2, 2, [1.0, 0.1, 10.0])
    packs.put(2, 0, 0)
    packs.put(1, 0, 1)
    packs.put(0, 1, 0)
    packs.fill([2, 1, 1])
    assert all(0 in slots for slots in packs.slots)


@pytest.mark.parametrize("seed", range(200))
def test_placements_hold_what_they_promise(seed: int) -> None:
    rng = random.Random(seed)
    layout = random_layout(rng)
    loads = random_loads(rng, 2, layout.num_logical)
    placement = place_experts(loads, layout)
    check(placement)
    assert placement == place_experts(loads, layout)
    for layer, layer_loads in enumerate(loads):
        assert sum(placement.rank_loads(layer, layer_loads)) == pytest.approx(sum(layer_loads))


def test_a_layer_like_deepseeks() -> None:
    loads = random_loads(random.Random(0), 3, 256)
    flat = ExpertLayout(num_logical=256, num_physical=288, num_ranks=32)
    for layout in (DEEPSEEK, flat):
        placement = place_experts(loads, layout)
        check(placement)
        for layer, layer_loads in enumerate(loads):
            before = max(sum(layer_loads[start : start + 8]) for start in range(0, 256, 8))
            assert max(placement.rank_loads(layer, layer_loads)) < before


@pytest.mark.parametrize("seed", range(20))
def test_a_lost_rank_takes_no_expert_with_it_that_has_two_copies(seed: int) -> None:
    rng = random.Random(seed)
    doubled = ExpertLayout(num_logical=24, num_physical=60, num_ranks=6, num_nodes=2, num_groups=4, min_replicas=2)
    for layout in (doubled, random_layout(rng)):
        placement = place_experts(random_loads(rng, 2, layout.num_logical), layout)
        for layer, experts in enumerate(placement.physical_to_logical):
            for lost in range(layout.num_ranks):
                left = {e for slot, e in enumerate(experts) if slot // layout.slots_per_rank != lost}
                gone = set(range(layout.num_logical)) - left
                assert all(placement.num_replicas(layer)[expert] == 1 for expert in gone)
                assert not gone or layout.min_replicas == 1


@pytest.mark.parametrize("seed", range(150))
def test_rebalancing_is_bounded_and_its_moves_lead_there(seed: int) -> None:
    rng = random.Random(seed)
    layout = random_layout(rng)
    old = place_experts(random_loads(rng, 2, layout.num_logical), layout)
    loads = random_loads(rng, 2, layout.num_logical)
    tolerance = rng.choice((1.0, 1.05, 1.5))
    new, moves = rebalance_experts(loads, old, tolerance=tolerance)
    check(new)
    assert (new, moves) == rebalance_experts(loads, old, tolerance=tolerance)
    fresh = place_experts(loads, layout)
    for layer, layer_loads in enumerate(loads):
        assert max(new.rank_loads(layer, layer_loads)) <= tolerance * max(fresh.rank_loads(layer, layer_loads)) + 1e-9
    slots = [list(experts) for experts in old.physical_to_logical]
    size = layout.slots_per_rank
    for move in moves:
        assert move.to_rank == move.physical // size
        had = old.physical_to_logical[move.layer][move.from_rank * size : (move.from_rank + 1) * size]
        assert move.logical in had
        assert slots[move.layer][move.physical] != move.logical
        slots[move.layer][move.physical] = move.logical
    assert tuple(map(tuple, slots)) == new.physical_to_logical


def test_the_same_loads_move_nothing() -> None:
    loads = random_loads(random.Random(1), 4, 256)
    placement = place_experts(loads, DEEPSEEK)
    assert rebalance_experts(loads, placement, tolerance=1.0) == (placement, [])


def test_loads_that_drift_move_little() -> None:
    rng = random.Random(2)
    loads = [[rng.paretovariate(1.5) for _ in range(256)] for _ in range(4)]
    old = place_experts(loads, DEEPSEEK)
    drifted = [[load * rng.uniform(0.9, 1.1) for load in layer] for layer in loads]
    _, moves = rebalance_experts(drifted, old)
    fresh = place_experts(drifted, DEEPSEEK)
    from_nothing = sum(
        a != b
        for was, now in zip(old.physical_to_logical, fresh.physical_to_logical, strict=True)
        for a, b in zip(was, now, strict=True)
    )
    assert len(moves) < from_nothing / 4


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"num_physical": 289}, "does not divide num_physical"),
        ({"num_nodes": 5}, "does not divide num_ranks"),
        ({"num_groups": 7}, "does not divide num_logical"),
        ({"num_physical": 224}, "take 256 to"),
        ({"num_physical": 256 * 32}, "take 256 to 2048 slots"),
        ({"min_replicas": 2}, "take 512 to"),
        ({"min_replicas": 9}, "do not fit on 8 ranks"),
        ({"num_ranks": 0}, "at least 1"),
    ],
)
def test_layouts_that_cannot_be(changed: dict[str, int], problem: str) -> None:
    numbers = {"num_logical": 256, "num_physical": 288, "num_ranks": 32, "num_nodes": 4, "num_groups": 8, "min_replicas": 1}
    with pytest.raises(ValueError, match=problem):
        ExpertLayout(**(numbers | changed))


def test_loads_that_cannot_be() -> None:
    layout = ExpertLayout(num_logical=2, num_physical=2, num_ranks=2)
    for loads in ([[1.0]], [[1.0, -1.0]], [[1.0, float("nan")]]):
        with pytest.raises(ValueError, match="layer 0 has"):
            place_experts(loads, layout)
    placement = place_experts([[1.0, 2.0]], layout)
    with pytest.raises(ValueError, match="layers"):
        rebalance_experts([[1.0, 2.0]] * 2, placement)
    with pytest.raises(ValueError, match="tolerance"):
        rebalance_experts([[1.0, 2.0]], placement, tolerance=0.5)
