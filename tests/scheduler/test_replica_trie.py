"""The router's index of the replicas' caches: events in order, gaps, snapshots, speculative entries."""

from __future__ import annotations

import random
import sys

import pytest
from pilotfish.common.requests import BlockRemoved, BlockStored
from pilotfish.scheduler.replica_trie import ReplicaTrie

PARENT = b"parent"
A, B, C = b"a", b"b", b"c"


def matched(trie, hashes, replica, *, tick):
    (number,) = trie.match(hashes, [replica], tick=tick)
    return number


def stored(*hashes):
    return tuple(BlockStored(block_hash, PARENT) for block_hash in hashes)


@pytest.fixture
def trie():
    trie = ReplicaTrie(speculative_ticks=10)
    for replica in ("r0", "r1"):
        trie.add_replica(replica)
    return trie


def test_match_is_the_longest_prefix_each_replica_holds(trie):
    trie.apply("r0", first_event_id=1, events=stored(A, B))
    trie.apply("r1", first_event_id=1, events=stored(A, C))
    assert trie.match([A, B, C], ["r0", "r1"], tick=0) == [2, 1]
    assert trie.match([C], ["r0", "r1"], tick=0) == [0, 1]
    assert trie.match([], ["r0", "r1"], tick=0) == [0, 0]


def test_removed_blocks_match_no_more(trie):
    trie.apply("r0", first_event_id=1, events=(*stored(A, B), BlockRemoved(B)))
    assert matched(trie, [A, B], "r0", tick=0) == 1


def test_events_seen_already_are_skipped(trie):
    assert trie.apply("r0", first_event_id=1, events=(*stored(A), BlockRemoved(A)))
    assert trie.apply("r0", first_event_id=1, events=(*stored(A), BlockRemoved(A), *stored(B)))
    assert matched(trie, [A], "r0", tick=0) == 0
    assert matched(trie, [B], "r0", tick=0) == 1
    assert trie.apply("r0", first_event_id=1, events=stored(C)), "an old message alone changes nothing"
    assert matched(trie, [C], "r0", tick=0) == 0
    assert trie.apply("r0", first_event_id=4, events=stored(C)), "and the next one is still the next"


def test_a_gap_needs_a_snapshot_and_the_old_index_stays_in_use(trie):
    trie.apply("r0", first_event_id=1, events=stored(A))
    assert not trie.apply("r0", first_event_id=3, events=stored(C))
    assert trie.needs_snapshot("r0")
    assert not trie.apply("r0", first_event_id=1, events=stored(A)), "an old message does not close the gap"
    assert not trie.needs_snapshot("r1")
    assert matched(trie, [A], "r0", tick=0) == 1


def test_a_message_without_events_shows_a_gap_too(trie):
    assert trie.apply("r0", first_event_id=1, events=())
    assert not trie.apply("r0", first_event_id=2, events=())


def test_events_that_came_before_the_snapshot_arrived_are_taken_after_it(trie):
    trie.apply("r0", first_event_id=1, events=stored(A))
    trie.apply("r0", first_event_id=3, events=stored(C))
    trie.apply("r0", first_event_id=4, events=(BlockRemoved(C), *stored(B)))
    assert trie.load_snapshot("r0", blocks=stored(C), next_event_id=4)
    assert not trie.needs_snapshot("r0")
    assert matched(trie, [B], "r0", tick=0) == 1
    assert matched(trie, [C], "r0", tick=0) == 0
    assert matched(trie, [A], "r0", tick=0) == 0, "the snapshot replaces what was known"
    assert trie.apply("r0", first_event_id=6, events=stored(A))


@pytest.mark.parametrize("num_blocks", [1_000, 100_000])
def test_a_large_snapshot_is_loaded_in_a_few_operations_a_block(trie, num_blocks):
    """Counted, not timed: calls of Python's and of C's functions, with what is known before and events on the way."""
    hashes = [number.to_bytes(16, "little") for number in range(2 * num_blocks)]
    trie.apply("r0", first_event_id=1, events=stored(*hashes[:num_blocks]))
    trie.apply("r0", first_event_id=2 * num_blocks, events=stored(*hashes[-100:]))  # a gap
    trie.insert_speculative("r0", hashes[:1000], tick=0)
    blocks, num_calls = stored(*hashes[:num_blocks]), 0

    def count(_frame, event, _argument):
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        complete = trie.load_snapshot("r0", blocks=blocks, next_event_id=2 * num_blocks)
    finally:
        sys.setprofile(None)
    assert complete
    assert trie.num_blocks("r0") == num_blocks + 100
    assert num_calls < 3 * num_blocks + 1000
    assert trie.match(hashes, ["r0", "r1"], tick=0) == [num_blocks, 0]


def test_a_gap_after_the_snapshot_needs_another(trie):
    trie.apply("r0", first_event_id=2, events=stored(B))
    trie.apply("r0", first_event_id=9, events=stored(C))
    assert not trie.load_snapshot("r0", blocks=(), next_event_id=4)
    assert trie.needs_snapshot("r0")
    assert trie.load_snapshot("r0", blocks=stored(A), next_event_id=9)
    assert matched(trie, [C], "r0", tick=0) == 1


def test_speculative_entries_lapse_unless_confirmed(trie):
    trie.insert_speculative("r0", [A, B], tick=0)
    trie.apply("r0", first_event_id=1, events=stored(A))
    assert matched(trie, [A, B], "r0", tick=9) == 2
    assert matched(trie, [A, B], "r0", tick=10) == 1
    assert trie.num_blocks("r0") == 1


def test_speculative_entries_outlive_a_snapshot(trie):
    trie.insert_speculative("r0", [A], tick=0)
    trie.load_snapshot("r0", blocks=stored(B), next_event_id=5)
    assert matched(trie, [A], "r0", tick=9) == 1
    assert matched(trie, [A], "r0", tick=10) == 0


def test_a_speculative_entry_made_again_lasts_from_then(trie):
    trie.insert_speculative("r0", [A], tick=0)
    trie.insert_speculative("r0", [A], tick=5)
    assert matched(trie, [A], "r0", tick=12) == 1
    assert matched(trie, [A], "r0", tick=15) == 0


def test_speculation_does_not_unsettle_what_is_confirmed(trie):
    trie.apply("r0", first_event_id=1, events=stored(A))
    trie.insert_speculative("r0", [A], tick=0)
    assert matched(trie, [A], "r0", tick=100) == 1


def test_a_removed_replica_is_forgotten_and_may_come_back(trie):
    trie.apply("r0", first_event_id=1, events=stored(A))
    trie.insert_speculative("r0", [B], tick=0)
    trie.remove_replica("r0")
    assert matched(trie, [A], "r1", tick=0) == 0
    trie.add_replica("r0")
    assert trie.apply("r0", first_event_id=1, events=stored(C)), "a new engine counts from 1"
    assert matched(trie, [B], "r0", tick=50) == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_messages_lost_and_repeated_against_a_set(seed):
    """Whatever is lost or repeated on the way: when no snapshot is wanted, the index is the replica's set of blocks."""
    rng = random.Random(seed)
    trie = ReplicaTrie(speculative_ticks=1)
    trie.add_replica("r")
    held: set[bytes] = set()
    next_id, sent = 1, []
    snapshot, num_checks = None, 0
    for tick in range(200):
        events = []
        for _ in range(rng.randint(0, 3)):
            block = bytes([rng.randrange(12)])
            events.append(BlockRemoved(block) if block in held else BlockStored(block, PARENT))
            held ^= {block}
        sent.append((next_id, tuple(events)))
        next_id += len(events)
        if rng.random() < 0.9:  # else lost
            trie.apply("r", first_event_id=sent[-1][0], events=sent[-1][1])
        if rng.random() < 0.1:
            first_id, old = rng.choice(sent)
            trie.apply("r", first_event_id=first_id, events=old)
        if snapshot is not None and rng.random() < 0.5:
            trie.load_snapshot("r", blocks=stored(*snapshot[0]), next_event_id=snapshot[1])
            snapshot = None
        elif trie.needs_snapshot("r"):
            snapshot = set(held), next_id
        caught_up = trie.apply("r", first_event_id=next_id, events=())
        if caught_up:
            num_checks += 1
            found = {bytes([n]) for n in range(12) if matched(trie, [bytes([n])], "r", tick=tick)}
            assert found == held
    assert num_checks > 50
