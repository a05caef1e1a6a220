"""Scenarios: who is planned, in what order and how far; a test is named after its scenario.

Scenarios of other engines that do not apply: "failed restore rolls back match" and the other state-space ones (no recurrent
state yet); "decode growth reclaims waiting blocks" in the sense of blocks that waiting sequences own (a waiting one owns none;
what is reclaimed is the cache); "smaller long first" (long prompts are served in line, aging included); "last chunk runs as
normal prefill" and "chunk and decode alternate" (every step mixes both); "prefetch skipped when sleeping" (no sleep yet).
"""

from __future__ import annotations

import pytest
from pilotfish.common.requests import FinishReason


def prompt(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


# Budget, chunks and order


def test_decode_rows_come_first_then_chunks_then_admissions(make_engine):
    engine = make_engine(max_num_batched_tokens=12)
    engine.add("decoding", prompt(0, 4))
    engine.step()
    engine.add("long", prompt(100, 30))
    engine.step()
    engine.add("short", prompt(200, 3))
    engine.step()
    assert engine.rows()[1:] == [
        [("decoding", 4, 1), ("long", 0, 11)],
        [("decoding", 5, 1), ("short", 0, 3), ("long", 11, 8)],
    ]


def test_a_step_never_exceeds_the_budget_and_uses_it(make_engine):
    engine = make_engine(max_num_batched_tokens=16)
    engine.add("a", prompt(0, 40))
    engine.add("b", prompt(100, 40))
    requests = [engine.step().num_tokens for _ in range(4)]
    assert requests == [16] * 4
    engine.run()


def test_only_the_first_chunks_blocks_are_allocated_for_a_long_prompt(make_engine):
    engine = make_engine(max_num_batched_tokens=8, block_size=4)
    engine.add("long", prompt(0, 60))
    engine.step()
    assert engine.scheduler.load().num_used_blocks == 2


def test_a_hit_that_starts_in_the_middle_of_a_chunk(make_engine):
    engine = make_engine(max_num_batched_tokens=10, block_size=4)
    request = engine.add("first", prompt(0, 9), max_tokens=1)
    engine.run()
    other = engine.add("second", prompt(0, 8) + prompt(50, 14), max_tokens=4)
    engine.run()
    assert engine.rows()[1:3] == [[("second", 8, 10)], [("second", 18, 4)]]
    engine.check_output(request)
    engine.check_output(other)


def test_budget_gate_uses_the_prefix_hit(make_engine):
    """A prompt longer than the budget runs in one step when the cache holds the rest of it."""
    engine = make_engine(max_num_batched_tokens=16, block_size=4)
    engine.add("first", prompt(0, 40), max_tokens=1)
    engine.run()
    engine.add("again", prompt(0, 40), max_tokens=1)
    plan = engine.step()
    assert [(row.start, row.num_tokens, row.samples) for row in plan.rows] == [(36, 4, True)]


def test_prefix_hit_admits_a_long_looking_sibling(make_engine):
    """While one long prompt advances, another that is short thanks to its hit passes."""
    engine = make_engine(max_num_batched_tokens=16, block_size=4, num_blocks=100)
    engine.add("seed", prompt(0, 40), max_tokens=1)
    engine.run()
    engine.add("long", prompt(500, 60))
    engine.step()
    engine.add("sibling", prompt(0, 42))
    plan = engine.step()
    assert [(row.request_id, row.num_tokens) for row in plan.rows] == [("sibling", 2), ("long", 14)]


def test_rollback_when_the_tail_still_exceeds_the_budget(make_engine):
    """A waiter that stays too long after its hit is passed over, and leaves no reference behind."""
    engine = make_engine(max_num_batched_tokens=16, block_size=4, num_blocks=100)
    engine.add("seed", prompt(0, 8), max_tokens=1)
    engine.run()
    engine.add("long", prompt(500, 60))
    engine.step()
    cached = engine.scheduler.load().num_cached_blocks
    engine.add("tail", prompt(0, 8) + prompt(700, 50))
    plan = engine.step()
    assert [row.request_id for row in plan.rows] == ["long"]
    assert engine.scheduler.load().num_cached_blocks == cached
    engine.run()


def test_short_only_pass_skips_a_long_waiter_without_mutation(make_engine):
    engine = make_engine(max_num_batched_tokens=16)
    engine.add("long 1", prompt(0, 60))
    engine.step()
    engine.add("long 2", prompt(100, 60))
    engine.add("short", prompt(200, 5))
    before = engine.scheduler.snapshot()
    plan = engine.step()
    assert [row.request_id for row in plan.rows] == ["short", "long 1"]
    assert [r.request_id for r in engine.scheduler.snapshot().requests] == [r.request_id for r in before.requests]
    assert engine.scheduler.load().num_waiting == 1


def test_no_starvation_of_short_prefills(make_engine):
    engine = make_engine(max_num_batched_tokens=16, num_blocks=100)
    engine.add("long", prompt(0, 200), max_tokens=1)
    engine.step()
    engine.add("short", prompt(300, 6), max_tokens=1)
    engine.step()
    assert engine.finish_reason("short") == FinishReason.LENGTH
    assert engine.finish_reason("long") is None


def test_no_starvation_of_a_long_prompt_by_short_ones(make_engine):
    engine = make_engine(max_num_batched_tokens=16, num_blocks=100)
    engine.add("long", prompt(0, 80), max_tokens=1)
    for number in range(40):
        engine.add(f"short {number}", prompt(1000 + 20 * number, 7), max_tokens=1)
        engine.step()
        if engine.finish_reason("long"):
            break
    assert len(engine.plans) <= 10, "it gets at least half of every step"


def test_oldest_long_prompt_first(make_engine):
    engine = make_engine(max_num_batched_tokens=16, num_blocks=100)
    for number in range(3):
        engine.add(f"long {number}", prompt(100 * number, 40), max_tokens=1)
    engine.run()
    assert list(engine.outputs) == ["long 0", "long 1", "long 2"]


# Priorities and aging


def test_higher_priority_is_admitted_first(make_engine):
    engine = make_engine(max_num_seqs=1)
    engine.add("running", prompt(0, 4), max_tokens=3, priority=2)
    engine.step()
    for name, priority in (("low", 0), ("high", 1), ("low too", 0)):
        engine.add(name, prompt(50, 4), max_tokens=1, priority=priority)
    engine.run()
    assert list(engine.outputs) == ["running", "high", "low", "low too"]


def test_aging_lets_nothing_starve(make_engine):
    engine = make_engine(max_num_seqs=1, priority_aging_steps=5)
    engine.add("low", prompt(0, 4), max_tokens=1)
    for number in range(30):
        engine.add(f"high {number}", prompt(0, 4), max_tokens=1, priority=2)
        engine.step()
        if "low" in engine.outputs:
            break
    assert 10 <= number < 15, "two steps of priority are worth ten engine steps"


def test_a_higher_priority_takes_the_place_of_a_lower_one(make_engine):
    engine = make_engine(max_num_seqs=2)
    low = [engine.add(f"low {n}", prompt(10 * n, 5), max_tokens=20) for n in range(2)]
    for _ in range(3):
        engine.step()
    high = engine.add("high", prompt(100, 5), max_tokens=2, priority=1)
    for _ in range(4):
        engine.step()
    assert engine.finish_reason("high") == FinishReason.LENGTH
    assert engine.scheduler.load().num_preemptions == 1
    engine.run()
    for request in (*low, high):
        engine.check_output(request)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_higher_priority_displaces_no_more_than_it_needs(make_engine, depth):
    engine = make_engine(num_blocks=22, block_size=4, depth=depth, prefix_caching=False)
    low = [engine.add(f"low {n}", prompt(10 * n, 8), max_tokens=12) for n in range(3)]
    engine.step()
    engine.step()
    high = engine.add("high", prompt(100, 24), max_tokens=2, priority=1)
    engine.run()
    assert list(engine.outputs)[-1] == "high"
    assert engine.scheduler.load().num_preemptions == 1
    for request in (*low, high):
        engine.check_output(request)


def test_equal_priorities_do_not_displace_each_other(make_engine):
    engine = make_engine(max_num_seqs=1)
    engine.add("first", prompt(0, 4), max_tokens=6)
    engine.step()
    engine.add("second", prompt(10, 4), max_tokens=6)
    engine.run()
    assert engine.scheduler.load().num_preemptions == 0


def test_an_older_waiter_of_equal_priority_displaces_nobody(make_engine):
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=16, num_blocks=100)
    engine.add("long 1", prompt(0, 40), max_tokens=8)
    engine.step()
    engine.add("long 2", prompt(100, 60), max_tokens=2)
    engine.add("short", prompt(200, 4), max_tokens=20)
    engine.run()
    assert engine.plans[1].admitted[0].request.request_id == "short"
    assert engine.scheduler.load().num_preemptions == 0
