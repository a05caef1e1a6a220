"""Text of the engine's loop, plain (one step in flight) and overlapped (two): it must not depend on how it was computed."""

from __future__ import annotations

import random
import time

import pytest
import torch
from pilotfish.common.requests import FinishReason
from pilotfish.scheduler.step_scheduler import SchedulerConfig, StepScheduler
from pilotfish.workers.step_loop import StepLoop
from pilotfish.workers.timed_runner import TimedRunner, TimedStep, TimingModel
from transformers import AutoModelForCausalLM

LOUD = {"temperature": 1.2, "top_p": 0.95, "frequency_penalty": 0.4, "repetition_penalty": 1.1, "min_tokens": 3}


@pytest.fixture(params=[1, 2], ids=["plain", "overlapped"])
def in_flight(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def greedy(tiny_llama):
    """Greedy continuation by transformers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()

    def continue_(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        with torch.inference_mode():
            ids = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=num_tokens, do_sample=False
            )
        return ids[0, len(prompt) :].tolist()

    return continue_


def random_prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def test_greedy_text_of_mixed_lengths_equals_transformers(run_requests, make_request, greedy, in_flight):
    lengths = [1, 2, 15, 16, 17, 33, 70, 100]
    requests = [
        make_request(f"r{length}", random_prompt(length, length), max_tokens=4 + index * 3, end_token_ids=(257,))
        for index, length in enumerate(lengths)
    ]
    result = run_requests(*requests, max_in_flight=in_flight, max_num_seqs=5, max_num_batched_tokens=48)
    for request in requests:
        assert result.tokens[request.request_id] == greedy(request.prompt_token_ids, request.sampling.max_tokens)
    assert max(step.num_batched_tokens for step in result.steps) <= 48
    assert any(step.num_batched_tokens == 48 for step in result.steps)


def test_an_end_token_stops_and_is_the_last_token(run_requests, make_request, in_flight):
    whole = run_requests(make_request("a", random_prompt(1, 9)), max_in_flight=in_flight).tokens["a"]
    assert len(set(whole[:4])) == 4
    ended = run_requests(make_request("a", random_prompt(1, 9), end_token_ids=(whole[3],)), max_in_flight=in_flight)
    assert ended.tokens["a"] == whole[:4]
    assert ended.reason("a") is FinishReason.STOP
    held = run_requests(
        make_request("a", random_prompt(1, 9), end_token_ids=(whole[3],), min_tokens=5), max_in_flight=in_flight
    )
    assert whole[3] not in held.tokens["a"][:5]
    assert held.tokens["a"][:3] == whole[:3]
    assert held.tokens["a"][3] != whole[3]


def test_a_sequence_ends_at_the_models_context(run_requests, make_request, in_flight):
    result = run_requests(make_request("a", random_prompt(1, 505), max_tokens=50), max_in_flight=in_flight)
    assert len(result.tokens["a"]) == 512 - 505
    assert result.reason("a") is FinishReason.LENGTH


def test_a_sequence_that_outgrows_the_cache_keeps_what_it_has(run_requests, make_request, in_flight):
    expected = run_requests(make_request("a", random_prompt(1, 20), max_tokens=100)).tokens["a"]
    result = run_requests(make_request("a", random_prompt(1, 20), max_tokens=100), num_kv_blocks=2, max_in_flight=in_flight)
    assert result.reason("a") is FinishReason.ERROR
    assert result.tokens["a"] == expected[: 32 - 20 + 1]


def test_a_prefix_hit_is_reported_and_changes_nothing(make_loop, collector, make_request, in_flight):
    loop = make_loop(collector, max_in_flight=in_flight)
    for name in ("first", "second"):
        loop.scheduler.add(make_request(name, random_prompt(3, 75)))
        while loop.has_work:
            loop.advance()
    assert collector.tokens["first"] == collector.tokens["second"]
    assert (collector.cached_tokens["first"], collector.cached_tokens["second"]) == (0, 64)
    prefill_steps = [step.num_batched_tokens for step in collector.steps if step.num_batched_tokens > 1]
    assert prefill_steps == [75, 75 - 64]
    stored = [event for step in collector.steps for event in step.kv_events]
    assert len(stored) == (75 + 15) // 16


def test_preemption_under_a_tiny_cache_gives_the_same_text(run_requests, make_request, in_flight):
    requests = [
        make_request(f"r{i}", random_prompt(i, 5 + 3 * i), max_tokens=40, seed=i, **(LOUD if i % 2 else {})) for i in range(8)
    ]
    roomy = run_requests(*requests)
    tight = run_requests(*requests, num_kv_blocks=8, max_in_flight=in_flight)
    assert tight.steps[-1].load.num_preemptions > 0 == roomy.steps[-1].load.num_preemptions
    assert tight.tokens == roomy.tokens


def test_a_seed_gives_the_same_text_alone_in_a_crowd_preempted_and_replayed(run_requests, make_request, in_flight):
    mine = make_request("mine", random_prompt(50, 21), max_tokens=30, seed=1234, **LOUD)
    alone = run_requests(mine, max_in_flight=in_flight).tokens["mine"]
    crowd = [make_request(f"r{i}", random_prompt(i, 1 + 2 * i), seed=i, temperature=1.0) for i in range(31)]
    assert run_requests(*crowd, mine, max_in_flight=in_flight).tokens["mine"] == alone

    rivals = [make_request(f"r{i}", random_prompt(i, 10), max_tokens=60, priority=1, temperature=1.0) for i in range(3)]
    squeezed = run_requests(mine, *rivals, num_kv_blocks=9, max_in_flight=in_flight)
    assert squeezed.steps[-1].load.num_preemptions > 0
    assert squeezed.tokens["mine"] == alone

    known = tuple(alone[:13])
    replay = make_request("mine", random_prompt(50, 21), outputs=known, max_tokens=30, seed=1234, **LOUD)
    replayed = run_requests(replay, max_in_flight=in_flight)
    assert replayed.first_offset["mine"] == 13
    assert [*known, *replayed.tokens["mine"]] == alone
    other = make_request("other", random_prompt(50, 21), max_tokens=30, seed=1235, **LOUD)
    assert run_requests(other).tokens["other"] != alone


def test_every_token_has_its_logprob_where_asked_for(run_requests, make_request, in_flight):
    requests = [make_request(f"r{i}", random_prompt(i, 4), logprobs=[None, 0, 3][i]) for i in range(3)]
    result = run_requests(*requests, max_in_flight=in_flight)
    assert result.logprobs["r0"] == []
    for name, num_top in (("r1", 0), ("r2", 3)):
        entries = result.logprobs[name]
        assert [entry.token_id for entry in entries] == result.tokens[name]
        assert all(entry.rank == 1 and entry.logprob <= 0 and len(entry.top) == num_top for entry in entries)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in result.logprobs["r2"])


def test_the_next_step_is_launched_before_the_result_of_this_one(make_loop, collector, make_request, in_flight):
    loop = make_loop(collector, max_in_flight=in_flight)
    loop.scheduler.add(make_request("a", random_prompt(1, 9), max_tokens=4))
    left_running = []
    while loop.has_work:
        loop.advance()
        left_running.append(loop.scheduler.num_in_flight)
    assert left_running == ([0] * 4 if in_flight == 1 else [1, 1, 1, 1, 0])
    assert len(collector.tokens["a"]) == 4


def test_steps_carry_their_timings(run_requests, make_request, in_flight):
    timings = [step.timings for step in run_requests(make_request("a", random_prompt(1, 9)), max_in_flight=in_flight).steps]
    assert all(t.plan_ms > 0 and t.forward_ms > 0 and t.sample_ms > 0 for t in timings)
    assert sum(t.forward_ms + t.sample_ms for t in timings) < sum(t.total_ms for t in timings)


SIZES = {"num_blocks": 64, "block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512}


def timed_loop(*, step_ms: float, in_flight: int = 2, on_step=lambda step: None, **sizes: int) -> tuple[StepLoop, TimedRunner]:
    runner = TimedRunner(TimingModel(decode_ms=((1, step_ms), (2, step_ms)), prefill_ms_per_token=0.0))
    scheduler = StepScheduler(SchedulerConfig(**SIZES | sizes))
    return StepLoop(runner, scheduler, on_step=on_step, max_in_flight=in_flight), runner


def test_a_plan_may_wait_until_shortly_before_the_step_in_flight_ends(make_request):
    loop, runner = timed_loop(step_ms=50.0)
    loop.add(make_request("a", random_prompt(1, 9), max_tokens=20))
    for _ in range(2):  # the prompt's step, and the first that decodes, of which nobody knows how long it takes
        loop.advance()
        assert loop.plan_at_s == 0
    for _ in range(3):
        loop.advance()
        assert runner._free_s - 0.0016 <= loop.plan_at_s <= time.monotonic() + 0.0486


def test_a_turn_that_was_late_makes_the_next_ones_earlier(make_request):
    loop, _ = timed_loop(step_ms=80.0)
    loop.add(make_request("a", random_prompt(1, 9), max_tokens=60))

    def rest_s() -> float:
        """Between the end of a step and the next turn."""
        loop.advance()
        return loop.plan_at_s - loop._last_end_s

    for _ in range(3):
        loop.advance()
    on_time_s = rest_s()
    time.sleep(0.1)
    late_s = rest_s()
    assert 0.0005 < on_time_s - late_s < 0.0025
    assert late_s < rest_s() <= on_time_s


def test_a_plan_does_not_wait_in_vain(make_request, monkeypatch):
    """Without overlap; where more waits than fits; beside a prompt; where nothing comes."""
    for sizes in ({"in_flight": 1}, {"max_num_seqs": 1}):
        loop, _ = timed_loop(step_ms=40.0, **sizes)
        for name in "ab":
            loop.add(make_request(name, random_prompt(1, 9), max_tokens=20))
        for _ in range(5):
            loop.advance()
            assert loop.plan_at_s == 0
    loop, _ = timed_loop(step_ms=40.0)
    loop.add(make_request("a", random_prompt(1, 9), max_tokens=20))
    for _ in range(4):
        loop.advance()
    assert loop.plan_at_s > 0
    loop.add(make_request("b", random_prompt(2, 40), max_tokens=20))
    loop.advance()
    assert loop.plan_at_s == 0
    for _ in range(3):
        loop.advance()
    assert loop.plan_at_s > 0
    monkeypatch.setattr("pilotfish.workers.step_loop._ARRIVALS_S", 0.0)
    loop.advance()
    assert loop.plan_at_s == 0


def test_a_step_that_was_held_up_does_not_hold_up_the_next(make_request, monkeypatch):
    """As by the compilation of a kernel. Were it believed, the device would wait as long once more."""
    loop, _ = timed_loop(step_ms=5.0)
    loop.add(make_request("a", random_prompt(1, 9), max_tokens=20))
    for _ in range(4):
        loop.advance()
    monkeypatch.setattr(TimedStep, "spent_ms", lambda step: {"forward": 900.0})
    loop.advance()
    assert loop.plan_at_s <= time.monotonic() + 0.0036
    loop.advance()
    assert loop.plan_at_s <= time.monotonic() + 0.0986


def test_the_times_of_steps_add_up_to_the_time_that_passed(collector, make_request, in_flight):
    """Also of those that were planned and launched while another ran; the time between two requests is no step's."""
    loop, _ = timed_loop(step_ms=5.0, in_flight=in_flight, on_step=collector)
    busy_s = 0.0
    for name in ("a", "b"):
        start_s = time.monotonic()
        loop.add(make_request(name, random_prompt(1, 9), max_tokens=6))
        while loop.has_work:
            loop.advance()
        busy_s += time.monotonic() - start_s
        time.sleep(0.02)
    timings = [step.timings for step in collector.steps]
    assert sum(t.forward_ms for t in timings) <= sum(t.total_ms for t in timings) <= busy_s * 1e3
