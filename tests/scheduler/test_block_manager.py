"""Block states and references, against a naive allocator."""

from __future__ import annotations

import random

import pytest
from pilotfish.scheduler.block_manager import BlockManager


def _states(manager):
    return manager.num_free, manager.num_cached, manager.num_used


def test_a_block_goes_through_its_life():
    manager = BlockManager(3)
    assert _states(manager) == (3, 0, 0)
    first, second = manager.allocate(2)
    assert _states(manager) == (1, 0, 2)
    manager.keep(first)
    manager.share([first])
    manager.release([first])
    assert _states(manager) == (1, 0, 2)
    manager.release([first, second])
    assert _states(manager) == (2, 1, 0)
    manager.share([first])
    assert _states(manager) == (2, 0, 1)
    manager.release([first])
    manager.drop(first)
    assert _states(manager) == (3, 0, 0)
    manager.check_invariants([])


def test_block_ids_start_at_one_because_page_zero_is_padding():
    assert sorted(BlockManager(5).allocate(5)) == [1, 2, 3, 4, 5]


def test_too_few_free_blocks_change_nothing():
    manager = BlockManager(4)
    held = manager.allocate(3)
    assert manager.allocate(2) is None
    assert manager.num_free == 1
    manager.check_invariants([held])


@pytest.mark.parametrize(
    "misuse",
    [
        lambda m, b: m.release([b, b]),
        lambda m, b: m.share([b + 1]),
        lambda m, b: m.drop(b),
        lambda m, b: m.keep(b + 1),
        lambda m, b: (m.keep(b), m.keep(b)),
        lambda m, b: (m.keep(b), m.drop(b)),
    ],
    ids=[
        "release twice",
        "share a free block",
        "drop what is not kept",
        "keep a free block",
        "keep twice",
        "drop a used block",
    ],
)
def test_misuse_is_noticed(misuse):
    manager = BlockManager(4)
    (block,) = manager.allocate(1)
    with pytest.raises(AssertionError):
        misuse(manager, block)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m, b: m._free.append(b), "listed free"),
        (lambda m, b: m._free.append(m._free[0]), "free twice"),
        (lambda m, b: m._references.__setitem__(b, 2), "references and 1 holders"),
        (lambda m, b: setattr(m, "_num_cached", 1), "are counted"),
    ],
)
def test_check_invariants_notices_damage(damage, message):
    manager = BlockManager(4)
    held = manager.allocate(1)
    manager.check_invariants([held])
    damage(manager, held[0])
    with pytest.raises(AssertionError, match=message):
        manager.check_invariants([held])


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_against_a_naive_allocator(seed):
    rng = random.Random(seed)
    manager = BlockManager(rng.randint(1, 12))
    holders: list[list[int]] = []
    kept: set[int] = set()
    for _ in range(300):
        used = {block for blocks in holders for block in blocks}
        cached = kept - used
        free = set(range(1, manager.num_blocks + 1)) - used - kept
        operation = rng.choice(("allocate", "share", "release", "keep", "drop"))
        if operation == "allocate":
            count = rng.randint(0, 4)
            blocks = manager.allocate(count)
            assert (blocks is None) == (count > len(free))
            if blocks is not None:
                assert len(set(blocks)) == count
                assert set(blocks) <= free
                holders.append(blocks)
        elif operation == "share" and used | cached:
            blocks = rng.sample(sorted(used | cached), rng.randint(1, len(used | cached)))
            manager.share(blocks)
            holders.append(blocks)
        elif operation == "release" and holders:
            manager.release(holders.pop(rng.randrange(len(holders))))
        elif operation == "keep" and used - kept:
            block = rng.choice(sorted(used - kept))
            manager.keep(block)
            kept.add(block)
        elif operation == "drop" and cached:
            block = rng.choice(sorted(cached))
            manager.drop(block)
            kept.remove(block)
        used = {block for blocks in holders for block in blocks}
        assert _states(manager) == (manager.num_blocks - len(used | kept), len(kept - used), len(used))
        manager.check_invariants(holders)
