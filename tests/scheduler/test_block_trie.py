"""The prefix cache: scenarios, and random operations against a dict of prefixes.

Scenarios of other engines' tries that do not apply here: image identities and spans (no images in a block yet; the salt is the
identity), routed-expert records (not kept), detached cursors (a sequence holds its whole path, so it never loses its place),
private overlap for speculative decoding and state-space checkpoints (no such models yet).
"""

from __future__ import annotations

import random

import pytest
from pilotfish.common.hashing import block_hashes, root_hash
from pilotfish.common.requests import BlockRemoved, BlockStored
from pilotfish.scheduler.block_manager import BlockManager
from pilotfish.scheduler.block_trie import BlockTrie

SIZE = 4
ROOT = root_hash()


class Cache:
    """A trie with whole-sequence helpers; `release` what `store` or `take` returned."""

    def __init__(self, num_blocks: int = 16) -> None:
        self.manager = BlockManager(num_blocks)
        self.trie = BlockTrie(self.manager, block_size=SIZE)

    def match(self, tokens, *, root=ROOT, hashes=None):
        return self.trie.match(tokens, hashes=hashes or block_hashes(tokens, SIZE, parent=root), root=root)

    def store(self, tokens, *, root=ROOT, hashes=None) -> list[int]:
        """Allocate, compute and insert the full blocks of `tokens` as a sequence without a match would; returns its blocks."""
        hashes = hashes or block_hashes(tokens, SIZE, parent=root)
        blocks = self.trie.allocate(-(-len(tokens) // SIZE))
        node = None
        for index, block_hash in enumerate(hashes):
            parent_hash = hashes[index - 1] if index else root
            own = tokens[index * SIZE : (index + 1) * SIZE]
            node = self.trie.insert(own, parent=node, parent_hash=parent_hash, block_hash=block_hash, block_id=blocks[index])
            if node is None:
                break
            if node.block_id != blocks[index]:
                self.trie.release([blocks[index]], tick=0)
                blocks[index] = node.block_id
        return blocks

    def put(self, tokens, *, tick, **kwargs) -> None:
        self.trie.release(self.store(tokens, **kwargs), tick=tick)

    def hit(self, tokens, **kwargs) -> int:
        """Cached tokens of a prompt, without a trace."""
        match = self.match(tokens, **kwargs)
        self.trie.rollback(match)
        return match.num_tokens

    def check(self, *holders) -> None:
        self.trie.check_invariants()
        self.manager.check_invariants(holders)


def test_match_keeps_at_least_one_token():
    cache = Cache()
    cache.put(list(range(8)), tick=1)
    assert cache.hit(list(range(8))) == 4
    assert cache.hit(list(range(9))) == 8
    assert cache.hit([0]) == 0
    cache.check()


def test_match_ends_at_the_first_block_that_differs():
    cache = Cache()
    cache.put(list(range(12)), tick=1)
    assert cache.hit([*range(8), 99, 99, 99, 99, 0]) == 8
    assert cache.hit([99, *range(1, 12), 0]) == 0


def test_identical_sibling_is_merged_on_insert():
    cache = Cache()
    first = cache.store(list(range(8)))
    second = cache.store(list(range(8)))
    assert second == first
    assert cache.manager.num_used == 2
    assert len(cache.trie) == 2
    cache.check(first, second)
    cache.trie.release(first, tick=1)
    cache.trie.release(second, tick=2)
    assert (cache.manager.num_free, cache.manager.num_cached) == (14, 2)
    cache.check()


def test_same_tokens_under_another_parent_are_another_block():
    cache = Cache()
    cache.put([*range(4), 9, 9, 9, 9], tick=1)
    assert cache.hit([9, 9, 9, 9, 0]) == 0


def test_salt_same_and_different():
    cache = Cache()
    tenant = root_hash(b"tenant")
    cache.put(list(range(8)), root=tenant, tick=1)
    assert cache.hit(list(range(9))) == 0
    assert cache.hit(list(range(9)), root=tenant) == 8


def test_eviction_takes_leaves_then_parents():
    cache = Cache()
    tokens = list(range(12))
    cache.put(tokens, tick=1)
    hashes = block_hashes(tokens, SIZE, parent=ROOT)
    cache.trie.drain_events()
    assert cache.trie.evict(2) == 2
    assert cache.trie.drain_events() == (4, (BlockRemoved(hashes[2]), BlockRemoved(hashes[1])))
    assert cache.hit(tokens) == 4
    cache.check()


def test_eviction_is_least_recently_used_first():
    cache = Cache()
    for tick, start in enumerate((0, 100, 200)):
        cache.put(list(range(start, start + 4)), tick=tick)
    match = cache.match(list(range(5)))
    cache.trie.release(match.block_ids, tick=10)
    cache.trie.evict(1)
    assert [cache.hit(list(range(start, start + 5))) for start in (0, 100, 200)] == [4, 0, 4]
    cache.trie.evict(1)
    assert [cache.hit(list(range(start, start + 5))) for start in (0, 100, 200)] == [4, 0, 0]


def test_of_equally_recent_leaves_the_older_goes_first():
    cache = Cache()
    for start in (100, 0, 200):
        cache.put(list(range(start, start + 4)), tick=1)
    cache.trie.evict(1)
    assert [cache.hit(list(range(start, start + 5))) for start in (100, 0, 200)] == [0, 4, 4]


def test_stale_leaf_entries_are_pruned():
    cache = Cache(num_blocks=64)
    cache.put(list(range(8)), tick=1)
    for tick in range(2, 50):  # used over and over, and a leaf no longer from the second time on
        match = cache.match([*range(8), *([tick] * 4), 0])
        cache.trie.release(match.block_ids, tick=tick)
        cache.put([*range(8), 50, 51, 52, 53], tick=tick)
    assert len(cache.trie._idle_leaves) <= len(cache.trie) == 3
    assert cache.trie.evict(3) == 3
    assert not cache.trie._idle_leaves
    cache.check()


def test_pinned_blocks_are_never_evicted():
    cache = Cache(num_blocks=4)
    held = cache.store(list(range(8)))
    cache.put(list(range(100, 108)), tick=1)
    assert cache.trie.evict(4) == 2
    assert cache.trie.allocate(3) is None
    assert cache.hit(list(range(9))) == 8
    cache.check(held)


def test_a_tentative_match_protects_its_blocks_from_eviction():
    cache = Cache(num_blocks=4)
    cache.put(list(range(16)), tick=1)
    match = cache.match([*range(8), 0])
    assert cache.trie.allocate(3) is None
    blocks = cache.trie.allocate(2)
    assert cache.hit([*range(8), 0]) == 8
    cache.check(match.block_ids, blocks)


def test_rollback_leaves_references_and_eviction_order_as_they_were():
    cache = Cache()
    cache.put(list(range(4)), tick=1)
    cache.put(list(range(100, 104)), tick=2)
    match = cache.match(list(range(5)))
    assert cache.trie.evict(2) == 1, "the matched block is pinned"
    cache.trie.rollback(match)
    cache.put(list(range(100, 104)), tick=3)
    cache.trie.evict(1)
    assert cache.hit(list(range(5))) == 0, "a rolled back match does not make its blocks recently used"
    cache.check()


def test_partial_tail_is_owned_and_freed():
    cache = Cache()
    blocks = cache.store(list(range(6)))
    assert len(blocks) == 2
    cache.trie.release(blocks, tick=1)
    assert (cache.manager.num_cached, cache.manager.num_free) == (1, 15)


def test_rebuilds_after_eviction():
    cache = Cache()
    tokens = list(range(12))
    cache.put(tokens, tick=1)
    cache.trie.evict(2)
    cache.put(tokens, tick=2)
    assert cache.hit([*tokens, 0]) == 12
    cache.check()


def test_hash_collision_is_verified_exactly():
    """Blocks that differ under one hash: never a wrong hit, and the newcomer stays private."""
    cache = Cache()
    hashes = block_hashes(list(range(8)), SIZE, parent=ROOT)
    cache.put(list(range(8)), tick=1)
    other = [*range(4), 9, 9, 9, 9]
    assert cache.hit([*other, 0], hashes=hashes) == 4
    blocks = cache.store(other, hashes=hashes)
    cache.trie.release(blocks, tick=2)
    assert cache.hit([*range(8), 0]) == 8
    assert len(cache.trie) == 2
    cache.check()


def test_collision_of_a_block_under_another_parent_ends_the_match():
    cache = Cache()
    cache.put(list(range(8)), tick=1)
    cache.put(list(range(100, 104)), tick=1)
    right = block_hashes(list(range(8)), SIZE, parent=ROOT)
    wrong = block_hashes(list(range(100, 104)), SIZE, parent=ROOT)
    assert cache.hit([*range(100, 104), *range(4, 8), 0], hashes=[wrong[0], right[1]]) == 4


def test_events_have_monotone_ids_and_parents_come_first():
    cache = Cache()
    tokens = list(range(8))
    hashes = block_hashes(tokens, SIZE, parent=ROOT)
    cache.put(tokens, tick=1)
    assert cache.trie.drain_events() == (1, (BlockStored(hashes[0], ROOT), BlockStored(hashes[1], hashes[0])))
    assert cache.trie.drain_events() == (3, ())
    cache.put(tokens, tick=2)
    assert cache.trie.next_event_id == 3, "a merged sibling is no event"
    cache.trie.evict(1)
    assert cache.trie.next_event_id == 4
    assert cache.trie.drain_events() == (3, (BlockRemoved(hashes[1]),))
    assert cache.trie.stored_blocks() == (BlockStored(hashes[0], ROOT),)


class NaiveTrie:
    """Prefixes of whole blocks -> [block, last used, order, holders]; everything by looking at everything."""

    def __init__(self) -> None:
        self.entries: dict[tuple, list] = {}
        self.order = 0

    def prefixes(self, salt, tokens):
        return [(salt, *tokens[: end * SIZE]) for end in range(1, len(tokens) // SIZE + 1)]

    def match(self, salt, tokens):
        found = []
        for prefix in self.prefixes(salt, tokens[:-1]):
            if prefix not in self.entries:
                break
            found.append(prefix)
        return found

    def evict(self):
        idle = [
            (last_used, order, prefix)
            for prefix, (_, last_used, order, holders) in self.entries.items()
            if not holders and not any(len(p) == len(prefix) + SIZE and p[: len(prefix)] == prefix for p in self.entries)
        ]
        if not idle:
            return None
        prefix = min(idle)[2]
        return prefix, self.entries.pop(prefix)[0]


@pytest.mark.parametrize("seed", range(25))
def test_random_operations_against_a_dict_of_prefixes(seed):
    rng = random.Random(seed)
    cache, naive = Cache(num_blocks=rng.choice((4, 8, 20))), NaiveTrie()
    sequences: list[tuple[list[int], list[tuple]]] = []  # blocks and prefixes held
    for tick in range(200):
        operation = rng.choice(("start", "start", "finish", "evict", "peek"))
        if operation in ("start", "peek"):
            salt = rng.choice((b"", b"x"))
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 4 * SIZE))]
            match = cache.match(tokens, root=root_hash(salt))
            expected = naive.match(salt, tokens)
            assert match.block_ids == tuple(naive.entries[prefix][0] for prefix in expected)
            if operation == "peek":
                cache.trie.rollback(match)
            else:
                sequences += _start(cache, naive, (salt, tokens), match, tick=tick)
        elif operation == "finish" and sequences:
            blocks, prefixes = sequences.pop(rng.randrange(len(sequences)))
            cache.trie.release(blocks, tick=tick)
            for prefix in prefixes:
                naive.entries[prefix][1] = tick
                naive.entries[prefix][3] -= 1
        elif operation == "evict":
            evicted = naive.evict()
            assert cache.trie.evict(1) == (evicted is not None)
            if evicted is not None:
                _, events = cache.trie.drain_events()
                assert events[-1] == BlockRemoved(_hash_of(evicted[0]))
        cache.check(*(blocks for blocks, _ in sequences))
        assert len(cache.trie) == len(naive.entries)


def _hash_of(prefix):
    salt, *tokens = prefix
    return block_hashes(tokens, SIZE, parent=root_hash(salt))[-1]


def _start(cache, naive, prompt, match, *, tick):
    """Admit a sequence, compute all its tokens, insert its full blocks. Returns [] and rolls back without room."""
    salt, tokens = prompt
    matched = naive.match(salt, tokens)
    missing = -(-len(tokens) // SIZE) - len(match.block_ids)
    for prefix in matched:
        naive.entries[prefix][3] += 1
    num_evictions = max(0, missing - cache.manager.num_free)
    if num_evictions > cache.manager.num_cached:
        assert cache.trie.allocate(missing) is None
        cache.trie.rollback(match)
        for prefix in matched:
            naive.entries[prefix][3] -= 1
        return []
    fresh = cache.trie.allocate(missing)
    removed = [event.block_hash for event in cache.trie.drain_events()[1] if isinstance(event, BlockRemoved)]
    assert removed[len(removed) - num_evictions :] == [_hash_of(naive.evict()[0]) for _ in range(num_evictions)]
    blocks = [*match.block_ids, *fresh]
    hashes = block_hashes(tokens, SIZE, parent=root_hash(salt))
    node = match.nodes[-1] if match.nodes else None
    prefixes = naive.prefixes(salt, tokens)
    for index in range(len(matched), len(prefixes)):
        own, prefix = blocks[index], prefixes[index]
        node = cache.trie.insert(
            tokens[index * SIZE : (index + 1) * SIZE],
            parent=node,
            parent_hash=hashes[index - 1] if index else root_hash(salt),
            block_hash=hashes[index],
            block_id=own,
        )
        if prefix in naive.entries:
            assert node.block_id == naive.entries[prefix][0] != own
            cache.trie.release([own], tick=tick)
            blocks[index] = node.block_id
            naive.entries[prefix][3] += 1
        else:
            assert node.block_id == own
            naive.entries[prefix] = [own, tick, naive.order, 1]
            naive.order += 1
    return [(blocks, prefixes)]
