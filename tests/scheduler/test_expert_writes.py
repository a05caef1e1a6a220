"""From placement to placement in bounded steps: every expert has a slot at all times, and no write is wasted."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from pilotfish.scheduler.expert_writes import after_writes, next_writes
from pilotfish.scheduler.step_plan import SlotWrite


def random_slots(rng: random.Random, num_experts: int, num_slots: int) -> list[int]:
    slots = [*range(num_experts), *(rng.randrange(num_experts) for _ in range(num_slots - num_experts))]
    rng.shuffle(slots)
    return slots


@pytest.mark.parametrize("seed", range(300))
def test_every_step_is_bounded_and_loses_no_expert(seed: int) -> None:
    rng = random.Random(seed)
    num_experts, num_ranks, limit = rng.randint(2, 24), rng.randint(1, 6), rng.choice((2, 3, 8, 100))
    slots_per_rank = -(-(num_experts + rng.randint(0, num_experts)) // num_ranks)
    now, target = (random_slots(rng, num_experts, slots_per_rank * num_ranks) for _ in range(2))
    num_open = num_changed = sum(a != b for a, b in zip(now, target, strict=True))
    num_writes = 0
    while now != target:
        writes = next_writes(now, target, slots_per_rank=slots_per_rank, limit=limit)
        assert writes == next_writes(now, target, slots_per_rank=slots_per_rank, limit=limit)
        assert len({write.slot for write in writes}) == len(writes)
        for slots in zip(*writes, strict=True):
            assert max(Counter(slot // slots_per_rank for slot in slots).values()) <= limit
        now, num_writes = after_writes(now, writes), num_writes + len(writes)
        assert set(now) == set(target)
        still_open = sum(a != b for a, b in zip(now, target, strict=True))
        assert still_open < num_open
        num_open = still_open
    assert next_writes(now, target, slots_per_rank=slots_per_rank, limit=limit) == ()
    assert num_changed <= num_writes <= 2 * num_changed
    if limit == 100:
        assert num_writes == num_changed


def test_a_new_copy_comes_from_the_rank_that_has_sent_least() -> None:
    writes = next_writes([0, 1, 0, 2, 2, 2], [0, 1, 0, 2, 0, 0], slots_per_rank=2, limit=8)
    assert writes == (SlotWrite(4, 0), SlotWrite(5, 2))


def test_experts_without_copies_change_places_in_one_step() -> None:
    assert next_writes([0, 1, 2], [1, 2, 0], slots_per_rank=1, limit=2) == (SlotWrite(0, 1), SlotWrite(1, 2), SlotWrite(2, 0))


def test_a_cycle_too_long_for_a_step_is_taken_apart() -> None:
    now, target, num_steps = list(range(8)), [*range(1, 8), 0], 0
    while now != target:
        now = after_writes(now, next_writes(now, target, slots_per_rank=8, limit=2))
        num_steps += 1
    assert num_steps == 7


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="limit is at least 2"):
        next_writes([0, 1], [1, 0], slots_per_rank=1, limit=1)
    with pytest.raises(ValueError, match=r"experts \[1\] have no slot"):
        next_writes([0, 1], [0, 0], slots_per_rank=1, limit=2)
