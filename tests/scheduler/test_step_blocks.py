"""Scenarios: growth, preemption, room, and what can never fit; a test is named after its scenario."""

from __future__ import annotations

import pytest
from pilotfish.common.errors import InvalidRequest
from pilotfish.common.requests import FinishReason
from pilotfish.common.tenants import Tenant


def prompt(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


# Blocks: growth, preemption, room


def test_decode_growth_reclaims_cached_blocks_before_preempting(make_engine):
    engine = make_engine(num_blocks=6, block_size=4)
    engine.add("past", prompt(0, 12), max_tokens=1)
    engine.run()
    assert engine.scheduler.load().num_cached_blocks == 3
    request = engine.add("now", prompt(100, 4), max_tokens=18)
    engine.run()
    assert engine.scheduler.load().num_preemptions == 0
    engine.check_output(request)


@pytest.mark.parametrize("depth", [1, 2])
def test_decode_growth_failure_keeps_other_rows(make_engine, depth):
    engine = make_engine(num_blocks=8, block_size=4, depth=depth, prefix_caching=False)
    requests = [engine.add(f"r{n}", prompt(10 * n, 3), max_tokens=20) for n in range(2)]
    engine.run()
    for request in requests:
        engine.check_output(request)
    assert engine.scheduler.load().num_preemptions == 1
    first = [(number, row) for number, rows in enumerate(engine.rows()) for row in rows if row[0] == "r0"]
    assert [(number, row[1]) for number, row in first] == [(0, 0), *((n, n + 2) for n in range(1, 20))], "r0 misses no step"


@pytest.mark.parametrize("depth", [1, 2])
def test_two_sequences_that_each_need_one_more_block_do_not_deadlock(make_engine, depth):
    engine = make_engine(num_blocks=8, block_size=4, max_num_seqs=2, depth=depth)
    requests = [engine.add(f"r{n}", prompt(10 * n, 4), max_tokens=25) for n in range(2)]
    engine.run()
    assert engine.scheduler.load().num_preemptions > 0
    for request in requests:
        engine.check_output(request)


def test_growth_with_steps_in_flight_preempts_no_more_than_it_needs(make_engine):
    """The victim's blocks come back with the step in flight: nobody else is preempted meanwhile."""
    engine = make_engine(num_blocks=18, block_size=4, max_num_seqs=3, depth=2, prefix_caching=False)
    requests = [engine.add(f"r{n}", prompt(10 * n, 4), max_tokens=24) for n in range(3)]
    engine.run()
    assert len(engine.plans[0].admitted) == 3
    for request in requests:
        engine.check_output(request)
    assert engine.scheduler.load().num_preemptions == 1


def test_the_newest_of_the_lowest_priority_is_preempted(make_engine):
    engine = make_engine(num_blocks=12, block_size=4, prefix_caching=False)
    for name, priority in (("old low", 0), ("new low", 0), ("high", 1)):
        engine.add(name, prompt(0, 4), max_tokens=16, priority=priority)
    engine.run()
    assert engine.scheduler.load().num_preemptions > 0
    recomputed = {row[0] for rows in engine.rows()[1:] for row in rows if row[1] == 0}
    assert recomputed == {"new low"}


def test_a_preempted_sequence_keeps_its_outputs_and_says_each_once(make_engine):
    engine = make_engine(num_blocks=8, block_size=4)
    requests = [engine.add(f"r{n}", prompt(10 * n, 4), max_tokens=20) for n in range(2)]
    engine.run()
    assert engine.scheduler.load().num_preemptions > 0
    readmitted = [admitted for plan in engine.plans[1:] for admitted in plan.admitted if admitted.num_output]
    assert readmitted
    for request in requests:
        engine.check_output(request)


def test_a_chunk_that_finds_no_block_keeps_the_committed_prefix(make_engine):
    """A prefill that runs dry waits with what it has while an older decode goes on, and starts no token twice."""
    engine = make_engine(num_blocks=19, block_size=4, max_num_seqs=2, max_num_batched_tokens=3, prefix_caching=False)
    older = engine.add("older", prompt(0, 3), max_tokens=30)
    for _ in range(6):
        engine.step()
    long = engine.add("long", prompt(100, 48), max_tokens=4)
    engine.run()
    engine.check_output(older)
    engine.check_output(long)
    ran = [(number, row[1]) for number, rows in enumerate(engine.rows()) for row in rows if row[0] == "long"]
    starts = [start for _, start in ran]
    assert starts == sorted(set(starts)), "nothing is computed twice"
    assert ran[-1][0] - ran[0][0] >= len(ran), "it missed a step"


def test_an_abandoned_chunk_is_dropped_with_no_clean_up_step(make_engine):
    engine = make_engine(max_num_batched_tokens=8)
    engine.add("long", prompt(0, 60))
    engine.step()
    assert engine.scheduler.abort("long")
    engine.collect()
    assert not engine.scheduler.has_work
    assert engine.scheduler.plan() is None
    assert engine.scheduler.load().num_used_blocks == 0


def test_admission_leaves_room_for_those_that_run(make_engine):
    engine = make_engine(num_blocks=8, block_size=4)
    engine.add("running", prompt(0, 8), max_tokens=4)
    engine.step()
    engine.add("next", prompt(100, 16), max_tokens=2)
    plan = engine.step()
    assert not plan.admitted, "its 4 blocks of the 5 that are free would leave the running one too few"
    engine.run()
    assert engine.scheduler.load().num_preemptions == 0


def test_a_waiter_without_room_leaves_no_trace(make_engine):
    engine = make_engine(num_blocks=8, block_size=4)
    engine.add("past", prompt(0, 8), max_tokens=1)
    engine.run()
    engine.add("running", prompt(200, 16), max_tokens=8)
    engine.step()
    load = engine.scheduler.load()
    engine.add("waiter", prompt(0, 8) + prompt(50, 12))
    engine.step()
    after = engine.scheduler.load()
    assert (after.num_waiting, after.num_cached_blocks - load.num_cached_blocks) == (1, 0)


# What can never fit


def test_a_lone_sequence_that_outgrows_the_cache_ends_with_an_error_that_says_what_to_do(make_engine):
    engine = make_engine(num_blocks=3, block_size=4)
    request = engine.add("big", prompt(0, 6), max_tokens=50)
    other = engine.add("other", prompt(50, 2), max_tokens=2)
    engine.run()
    engine.check_output(request)
    engine.check_output(other)
    error = engine.outputs["big"][-1].error
    assert "13 tokens" in error
    assert "cache of 12" in error
    assert "kv_memory_fraction" in error


def test_a_prompt_larger_than_the_cache_ends_at_once(make_engine):
    engine = make_engine(num_blocks=3, block_size=4)
    engine.add("big", prompt(0, 13))
    assert engine.finish_reason("big") == FinishReason.ERROR
    assert not engine.scheduler.has_work


def test_a_prompt_that_fills_the_cache_exactly_gets_its_one_token(make_engine):
    engine = make_engine(num_blocks=3, block_size=4)
    request = engine.add("exact", prompt(0, 12), max_tokens=1)
    engine.run()
    engine.check_output(request)


@pytest.mark.parametrize("length", [16, 17])
def test_a_prompt_without_room_for_output_in_the_model_is_refused(make_engine, length):
    engine = make_engine(max_model_len=16)
    engine.add("long", prompt(0, length))
    assert engine.finish_reason("long") == FinishReason.ERROR
    assert str(length) in engine.outputs["long"][0].error


def test_an_empty_prompt_is_refused(make_engine):
    engine = make_engine()
    engine.add("empty", [])
    assert engine.finish_reason("empty") == FinishReason.ERROR


def test_a_request_id_in_use_is_refused(make_engine):
    engine = make_engine()
    request = engine.add("same", prompt(0, 4))
    with pytest.raises(InvalidRequest, match="same"):
        engine.add("same", prompt(9, 4))
    engine.run()
    engine.check_output(request)
    engine.add("same", prompt(9, 4))


def preempted_first(make_engine, requests):
    """Which of these (name, priority, tenant, prompt tokens) is computed from its start again first."""
    engine = make_engine(num_blocks=16, block_size=4, prefix_caching=False, max_num_seqs=8)
    for number, (name, priority, tenant, num_prompt) in enumerate(requests):
        engine.add(name, prompt(50 * number, num_prompt), max_tokens=24, priority=priority, tenant=tenant)
    while not engine.scheduler.load().num_preemptions:
        before = {s.request_id for s in engine.scheduler._lines.running}
        engine.step()
    after = {s.request_id for s in engine.scheduler._lines.running}
    engine.run()
    return before - after


def test_of_equal_priorities_the_tenant_over_its_share_gives_way(make_engine):
    small, large = Tenant("small"), Tenant("large")
    requests = [("l0", 0, large, 12), ("l1", 0, large, 12), ("s0", 0, small, 4)]
    assert preempted_first(make_engine, requests) == {"l1"}, "not s0, the last in line"
    heavy = [
        (name, priority, Tenant(tenant.name, 10.0 if tenant is large else 1.0), n) for name, priority, tenant, n in requests
    ]
    assert preempted_first(make_engine, heavy) == {"s0"}, "a tenth of the blocks, but for a tenth of the weight"


def test_the_lowest_priority_gives_way_before_the_tenant_over_its_share(make_engine):
    small, large = Tenant("small"), Tenant("large")
    assert preempted_first(make_engine, [("l0", 0, large, 12), ("l1", 0, large, 12), ("s0", -1, small, 4)]) == {"s0"}
