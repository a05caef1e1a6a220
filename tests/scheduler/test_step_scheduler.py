"""Scenarios: how sequences end, aborts, replays, and the scheduler's contract with its engine."""

from __future__ import annotations

import pytest
from pilotfish.common.errors import ConfigError
from pilotfish.common.requests import FinishReason
from pilotfish.scheduler.step_plan import StepResult
from pilotfish.scheduler.step_scheduler import SchedulerConfig, StepScheduler


def prompt(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


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


def test_a_step_of_nothing_takes_an_id_and_no_result(request_of):
    """Other data ranks have work: a follower sees steps without gaps, and the scheduler's own go on around it."""
    config = SchedulerConfig(num_blocks=16, block_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32)
    scheduler = StepScheduler(config)
    assert scheduler.plan_nothing().step_id == 1
    assert not scheduler.has_work
    scheduler.add(request_of("r", prompt(0, 5), max_tokens=3))
    ids = []
    for _ in range(3):
        plan, nothing = scheduler.plan(), scheduler.plan_nothing()
        assert plan is not None
        assert (nothing.rows, nothing.num_tokens, nothing.is_decode) == ((), 0, True)
        ids += [plan.step_id, nothing.step_id]
        scheduler.update(StepResult(plan.step_id, (7,), (None,)))
        scheduler.check_invariants()
    assert ids == [2, 3, 4, 5, 6, 7]
    assert not scheduler.has_work
