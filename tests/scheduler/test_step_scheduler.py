"""Scenarios of the step scheduler; a test is named after its scenario.

Scenarios of other engines that do not apply: "failed restore rolls back match" and the other state-space ones (no recurrent
state yet); "decode growth reclaims waiting blocks" in the sense of blocks that waiting sequences own (a waiting one owns none;
what is reclaimed is the cache); "smaller long first" (long prompts are served in line, aging included); "last chunk runs as
normal prefill" and "chunk and decode alternate" (every step mixes both); "prefetch skipped when sleeping" (no sleep yet).
"""

from __future__ import annotations

import pytest
from pilotfish.common.errors import ConfigError, InvalidRequest
from pilotfish.common.requests import FinishReason
from pilotfish.scheduler.step_plan import StepResult
from pilotfish.scheduler.step_scheduler import SchedulerConfig


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


# Prefix cache


def test_a_prompt_that_is_cached_whole_still_computes(make_engine):
    engine = make_engine(block_size=4)
    engine.add("first", prompt(0, 8), max_tokens=1)
    engine.run()
    again = engine.add("again", prompt(0, 8), max_tokens=3)
    engine.run()
    assert engine.rows()[1] == [("again", 4, 4)]
    engine.check_output(again)


def test_blocks_are_matchable_only_when_computed(make_engine):
    """Two equal prompts admitted with two steps in flight: the second never reads what no finished step has written."""
    engine = make_engine(block_size=4, max_num_batched_tokens=8, depth=2)
    engine.add("a", prompt(0, 20), max_tokens=2)
    engine.plan()
    assert engine.scheduler.drain_kv_events() == (1, ())
    engine.add("b", prompt(0, 20), max_tokens=2)
    plan = engine.plan()
    assert not any(admitted.block_ids for admitted in plan.admitted)
    engine.deliver()
    assert len(engine.scheduler.drain_kv_events()[1]) == 2


def test_a_waiter_waits_for_the_prefix_that_a_running_prefill_computes(make_engine):
    engine = make_engine(block_size=4, max_num_batched_tokens=64)
    requests = [engine.add(f"r{n}", [*prompt(0, 20), 100 + n], max_tokens=2) for n in range(6)]
    engine.run()
    for request in requests:
        engine.check_output(request)
    assert sum(plan.num_tokens for plan in engine.plans) == 21 + 5 * 1 + 6 * 1, "the common prefix is computed once"


def test_a_waiter_does_not_wait_for_the_smaller_part_of_its_prompt(make_engine):
    engine = make_engine(block_size=4, max_num_batched_tokens=64)
    for number in range(2):
        engine.add(f"r{number}", prompt(0, 8) + prompt(100 * (number + 1), 12), max_tokens=2)
    assert len(engine.step().admitted) == 2


def test_a_waiter_does_not_wait_for_a_block_that_it_must_compute_itself(make_engine):
    """Of a prompt of whole blocks the last is never matched."""
    engine = make_engine(block_size=4, max_num_batched_tokens=7, max_num_seqs=2)
    engine.add("leader", prompt(0, 8))
    engine.step()
    engine.add("follower", prompt(0, 8))
    assert [(row.request_id, row.start) for row in engine.step().rows] == [("leader", 7), ("follower", 4)]


def test_a_waiter_whose_leader_is_aborted_computes_the_prefix_itself(make_engine):
    engine = make_engine(block_size=4, max_num_batched_tokens=8)
    engine.add("leader", prompt(0, 40))
    engine.step()
    follower = engine.add("follower", prompt(0, 40))
    engine.step()
    engine.scheduler.abort("leader")
    engine.run()
    engine.check_output(follower)


def test_a_waiter_does_not_wait_for_blocks_that_a_collision_keeps_private(make_engine, monkeypatch):
    def one_hash(token_ids, block_size, *, parent):
        return [b"the same"] * (len(token_ids) // block_size)

    monkeypatch.setattr("pilotfish.scheduler.sequence_cache.block_hashes", one_hash)
    engine = make_engine(block_size=4)
    engine.add("first to have the hash", prompt(0, 5), max_tokens=1)
    engine.run()
    engine.add("leader", prompt(50, 12), max_tokens=30)
    engine.step()
    follower = engine.add("follower", prompt(50, 12), max_tokens=2)
    assert [admitted.request for admitted in engine.step().admitted] == [follower]
    engine.run()
    engine.check_output(follower)


def test_identical_siblings_are_merged_and_the_runner_is_told(make_engine):
    """Equal prompts decode the same tokens: their new blocks are one, and the freed twin is used by nobody meanwhile."""
    engine = make_engine(block_size=2, max_num_seqs=2)
    requests = [engine.add(f"r{n}", prompt(0, 5), max_tokens=12) for n in range(2)]
    engine.run()
    for request in requests:
        engine.check_output(request)
    assert any(plan.replaced_blocks for plan in engine.plans)


def test_finished_blocks_stay_cached_and_so_do_outputs(make_engine):
    engine = make_engine(block_size=4)
    request = engine.add("first", prompt(0, 6), max_tokens=7)
    engine.run()
    tokens = prompt(0, 6) + engine.tokens("first")
    assert engine.scheduler.load().num_cached_blocks == 3, "12 of 13 tokens were computed"
    engine.add("turn 2", [*tokens, 99], max_tokens=1)
    engine.run()
    assert engine.outputs["turn 2"][0].cached_tokens == 12
    engine.check_output(request)


@pytest.mark.parametrize("max_tokens", [4, 5])
def test_finishing_on_a_block_border(make_engine, max_tokens):
    """The last token is never computed: its block counts only if the tokens before it fill it."""
    engine = make_engine(block_size=4)
    request = engine.add("r", prompt(0, 4), max_tokens=max_tokens)
    engine.run()
    engine.check_output(request)
    assert engine.scheduler.load().num_cached_blocks == (4 + max_tokens - 1) // 4
    assert engine.scheduler.load().num_used_blocks == 0


def test_salts_do_not_share(make_engine):
    engine = make_engine(block_size=4)
    for name, salt in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        engine.add(name, prompt(0, 9), max_tokens=1, salt=salt)
        engine.run()
    assert [engine.outputs[name][0].cached_tokens for name in "abc"] == [0, 0, 8]


def test_no_prefix_caching_shares_nothing(make_engine):
    engine = make_engine(block_size=4, prefix_caching=False)
    for name in "ab":
        engine.add(name, prompt(0, 9), max_tokens=1)
        engine.run()
    assert engine.outputs["b"][0].cached_tokens == 0
    assert engine.scheduler.load().num_cached_blocks == 0
    assert engine.scheduler.drain_kv_events() == (1, ())


def test_cached_tokens_count_only_the_current_prompt_on_the_first_output(make_engine):
    engine = make_engine(block_size=4)
    engine.add("first", prompt(0, 9), max_tokens=1)
    engine.run()
    engine.add("second", prompt(0, 9) + prompt(50, 6), max_tokens=3)
    engine.run()
    assert [output.cached_tokens for output in engine.outputs["second"]] == [8, 0, 0]


def test_statistics_exclude_hits_of_a_recompute(make_engine):
    """What a preempted sequence finds again of its own is no saving of its request."""
    engine = make_engine(num_blocks=9, block_size=4, max_num_seqs=2)
    engine.add("older", prompt(0, 4), max_tokens=18)
    engine.add("newer", prompt(100, 4), max_tokens=25)
    engine.run()
    readmitted = [admitted for plan in engine.plans[1:] for admitted in plan.admitted]
    assert any(admitted.num_computed for admitted in readmitted)
    assert {output.cached_tokens for outputs in engine.outputs.values() for output in outputs} == {0}


def test_statistics_exclude_hits_of_a_prefill_begun_again(make_engine):
    """Preempted before its first output, a prompt finds its own blocks again."""
    engine = make_engine(num_blocks=19, block_size=4, max_num_seqs=2, max_num_batched_tokens=3)
    engine.add("older", prompt(0, 3), max_tokens=50)
    for _ in range(6):
        engine.step()
    engine.add("long", prompt(100, 48), max_tokens=4)
    engine.run()
    admitted = [admitted for plan in engine.plans for admitted in plan.admitted if admitted.request.request_id == "long"]
    assert [a.num_output for a in admitted] == [0, 0]
    assert admitted[1].num_computed > 0
    assert engine.outputs["long"][0].cached_tokens == 0


def test_cached_tokens_of_a_replay_do_not_count_outputs(make_engine):
    engine = make_engine(block_size=4)
    engine.add("first", prompt(0, 5), max_tokens=8)
    engine.run()
    tokens = engine.tokens("first")
    engine.add("replay", prompt(0, 5), max_tokens=9, output_token_ids=tuple(tokens))
    engine.run()
    assert engine.plans[-1].admitted[0].num_computed == 12
    assert engine.outputs["replay"][0].cached_tokens == 5


# How sequences end


def test_an_end_token_stops_and_is_part_of_the_output(make_engine, request_of, output_of):
    engine = make_engine()
    tokens, _ = output_of(request_of("free", prompt(0, 4), max_tokens=12), engine.config)
    end = tokens[5]
    engine.add("r", prompt(0, 4), max_tokens=12, end_token_ids=(end,))
    engine.run()
    assert engine.tokens("r") == tokens[: tokens.index(end) + 1]
    assert engine.finish_reason("r") == FinishReason.STOP


def test_min_tokens_hold_end_tokens_back(make_engine, request_of, output_of):
    engine = make_engine()
    tokens, _ = output_of(request_of("free", prompt(0, 4), max_tokens=12), engine.config)
    engine.add("r", prompt(0, 4), max_tokens=12, end_token_ids=tuple(tokens), min_tokens=3)
    engine.run()
    assert len(engine.tokens("r")) == 4, "the first token after the minimum may end it"


def test_max_model_len_ends_a_sequence(make_engine):
    engine = make_engine(max_model_len=10)
    request = engine.add("r", prompt(0, 4), max_tokens=50)
    engine.run()
    assert len(engine.tokens("r")) == 6
    engine.check_output(request)


@pytest.mark.parametrize("depth", [1, 2])
def test_no_row_is_planned_past_a_known_limit(make_engine, depth):
    engine = make_engine(depth=depth)
    engine.add("r", prompt(0, 4), max_tokens=3)
    engine.run()
    assert engine.rows() == [[("r", 0, 4)], [("r", 4, 1)], [("r", 5, 1)]]


def test_a_stop_is_seen_one_step_late_and_the_extra_token_is_dropped(make_engine, request_of, output_of):
    engine = make_engine(depth=2)
    tokens, _ = output_of(request_of("free", prompt(0, 4), max_tokens=12), engine.config)
    request = engine.add("r", prompt(0, 4), max_tokens=12, end_token_ids=(tokens[2],))
    engine.run()
    assert len(engine.plans) == tokens.index(tokens[2]) + 2
    engine.check_output(request)


def test_at_most_two_steps_are_in_flight(make_engine):
    engine = make_engine()
    engine.add("r", prompt(0, 4), max_tokens=9)
    assert [engine.plan() is not None for _ in range(3)] == [True, True, False]
    engine.deliver()
    assert engine.plan() is not None
    engine.run()


def test_an_error_ends_only_its_own_row(make_engine):
    engine = make_engine()
    engine.add("bad", prompt(0, 4))
    good = engine.add("good", prompt(10, 4))
    engine.plan()
    engine.deliver(errors={"bad": "the logits are not finite"})
    engine.run()
    assert engine.outputs["bad"][0].error == "the logits are not finite"
    assert engine.finish_reason("bad") == FinishReason.ERROR
    assert engine.tokens("bad") == []
    engine.check_output(good)


def test_blocks_of_a_failed_step_are_not_matchable(make_engine):
    engine = make_engine(block_size=4)
    engine.add("bad", prompt(0, 12))
    engine.plan()
    engine.deliver(errors={"bad": "out of memory"})
    assert engine.scheduler.load().num_cached_blocks == 0


# Abort


def test_abort_of_a_waiting_a_running_and_an_unknown_request(make_engine):
    engine = make_engine(max_num_seqs=1)
    engine.add("running", prompt(0, 4), max_tokens=9)
    engine.add("waiting", prompt(10, 4))
    engine.step()
    assert engine.scheduler.abort("waiting")
    assert engine.scheduler.abort("running", FinishReason.DEADLINE)
    assert not engine.scheduler.abort("running")
    assert not engine.scheduler.abort("nobody")
    engine.collect()
    assert engine.finish_reason("waiting") == FinishReason.ABORT
    assert engine.finish_reason("running") == FinishReason.DEADLINE
    assert engine.outputs["running"][-1].offset == 1
    assert engine.scheduler.load().num_used_blocks == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_abort_in_flight_frees_the_blocks_when_the_steps_are_done(make_engine, depth):
    engine = make_engine(depth=3)
    engine.add("r", prompt(0, 9), max_tokens=9)
    for _ in range(depth):
        engine.plan()
    assert engine.scheduler.abort("r")
    assert engine.scheduler.load().num_used_blocks == 3
    assert engine.scheduler.plan() is None
    for _ in range(depth):
        assert engine.scheduler.has_work
        engine.deliver()
    assert not engine.scheduler.has_work
    assert engine.scheduler.load().num_used_blocks == 0
    assert engine.tokens("r") == []


def test_an_id_can_be_used_again_while_its_aborted_namesake_is_in_flight(make_engine):
    engine = make_engine()
    engine.add("r", prompt(0, 4), max_tokens=9)
    engine.plan()
    engine.scheduler.abort("r")
    engine.collect()
    engine.outputs.clear()
    request = engine.add("r", prompt(50, 6), max_tokens=3)
    engine.run()
    engine.check_output(request)


def test_fail_ends_with_the_message(make_engine):
    engine = make_engine()
    engine.add("r", prompt(0, 4))
    assert engine.scheduler.fail("r", "the device is lost")
    assert not engine.scheduler.fail("r", "again")
    engine.collect()
    assert engine.outputs["r"][0].error == "the device is lost"


# Replay


def test_a_replay_goes_on_at_the_right_token(make_engine, request_of, output_of):
    engine = make_engine()
    tokens, _ = output_of(request_of("r", prompt(0, 6), max_tokens=10), engine.config)
    request = engine.add("r", prompt(0, 6), max_tokens=10, output_token_ids=tuple(tokens[:4]))
    engine.run()
    assert engine.plans[0].admitted[0].num_output == 4
    assert engine.plans[0].rows[0].output_position == 4
    assert engine.outputs["r"][0].offset == 4
    engine.check_output(request)


@pytest.mark.parametrize(("num_known", "reason"), [(10, FinishReason.LENGTH), (3, FinishReason.STOP)])
def test_a_replay_that_had_ended_ends_at_once(make_engine, request_of, output_of, num_known, reason):
    engine = make_engine()
    tokens, _ = output_of(request_of("r", prompt(0, 6), max_tokens=10), engine.config)
    end = (tokens[2],) if reason == FinishReason.STOP else ()
    engine.add("r", prompt(0, 6), max_tokens=10, output_token_ids=tuple(tokens[:num_known]), end_token_ids=end)
    assert engine.finish_reason("r") == reason
    assert engine.outputs["r"][0].offset == num_known
    assert engine.scheduler.plan() is None


# The contract with the engine


def test_results_must_come_in_order_and_complete(make_engine):
    engine = make_engine()
    scheduler = engine.scheduler
    engine.add("r", prompt(0, 4), max_tokens=9)
    with pytest.raises(ValueError, match="in flight is none"):
        scheduler.update(StepResult(1, (), ()))
    scheduler.plan()
    scheduler.plan()
    with pytest.raises(ValueError, match="oldest step in flight is 1"):
        scheduler.update(StepResult(2, (5,), (None,)))
    with pytest.raises(ValueError, match="samples 1 rows"):
        scheduler.update(StepResult(1, (), ()))
    scheduler.update(StepResult(1, (5,), (None,)))
    assert scheduler.drain_outputs()[0].token_ids == (5,)


def test_load_counts_what_there_is(make_engine):
    engine = make_engine(num_blocks=20, block_size=4, max_num_seqs=1, max_num_batched_tokens=8)
    engine.add("long", prompt(0, 30))
    engine.add("waiting", prompt(100, 10))
    engine.step()
    load = engine.scheduler.load()
    assert (load.num_running, load.num_waiting, load.queued_tokens) == (1, 1, 22 + 10)
    assert load.num_free_blocks + load.num_cached_blocks + load.num_used_blocks == 20


def test_snapshot_has_requests_the_index_and_the_next_event(make_engine):
    engine = make_engine(block_size=4, max_num_seqs=1)
    engine.add("running", prompt(0, 9), max_tokens=9)
    engine.add("waiting", prompt(50, 3))
    engine.step()
    snapshot = engine.scheduler.snapshot()
    requests = [(r.request_id, r.num_prompt_tokens, r.num_output_tokens) for r in snapshot.requests]
    assert requests == [("running", 9, 1), ("waiting", 3, 0)]
    first_id, events = engine.scheduler.drain_kv_events()
    assert snapshot.blocks == events
    assert snapshot.next_event_id == first_id + len(events)


@pytest.mark.parametrize(
    ("field", "value"), [("num_blocks", 0), ("max_num_seqs", 0), ("max_num_batched_tokens", 3), ("priority_aging_steps", 0)]
)
def test_a_configuration_that_cannot_work_is_refused(field, value):
    fields = {"num_blocks": 4, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 64}
    with pytest.raises(ConfigError, match=field):
        SchedulerConfig(**(fields | {field: value}))
