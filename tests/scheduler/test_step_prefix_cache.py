"""Scenarios: prefix hits, sharing and what is counted of them; a test is named after its scenario."""

from __future__ import annotations

import pytest


def prompt(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


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
