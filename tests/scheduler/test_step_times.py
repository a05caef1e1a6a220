"""The learned cost of a step."""

from __future__ import annotations

import random

import pytest
from pilotfish.scheduler.step_times import StepTime, StepTimes

PRIOR = StepTime.line(10.0, 0.1)
MAX_DECODING = 64


def parts(num_tokens):
    """A step of few tokens decodes so many sequences; a larger one computes a prompt."""
    return (num_tokens, 0) if num_tokens <= MAX_DECODING else (0, num_tokens)


def observe(times, replica, *, num_tokens, step_ms):
    num_decoding, num_prompt_tokens = parts(num_tokens)
    times.observe(replica, num_decoding=num_decoding, num_prompt_tokens=num_prompt_tokens, step_ms=step_ms)


def step_ms_of(times, replica, num_tokens):
    return times.of(replica).step_ms(*parts(num_tokens))


def test_the_prior_holds_until_steps_are_seen():
    assert StepTimes(prior=PRIOR).of("r") == PRIOR


def test_a_line_is_learned_from_mixed_steps():
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for _ in range(300):
        num_tokens = rng.choice((1, 8, 64, 512, 2048))
        observe(times, "r", num_tokens=num_tokens, step_ms=30 + 0.5 * num_tokens)
    learned = times.of("r")
    assert learned.ms_per_token == pytest.approx(0.5, rel=0.05)
    assert learned.decode_ms(1) == pytest.approx(30, rel=0.2)


def test_what_prompts_add_is_no_line():
    """Every step reads the weights, which hides short prompts: 4 ms up to 160 tokens, and 0.025 ms for each from there."""
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for _ in range(2000):
        num_decoding, num_prompt_tokens = rng.randint(1, 32), rng.choice((0, 0, 40, 100, 160, 300, 800, 1600))
        step_ms = max(4.0, 0.025 * num_prompt_tokens) + 0.05 * num_decoding
        times.observe("r", num_decoding=num_decoding, num_prompt_tokens=num_prompt_tokens, step_ms=step_ms)
    learned = times.of("r")
    assert learned.prompt_ms(100) == pytest.approx(0, abs=0.2)
    assert learned.prompt_ms(800) - learned.prompt_ms(300) == pytest.approx(12.5, rel=0.1)
    assert learned.decode_ms(30) - learned.decode_ms(10) == pytest.approx(1.0, rel=0.2)


def test_equal_steps_do_not_make_a_wild_line():
    times = StepTimes(prior=PRIOR)
    for _ in range(300):
        observe(times, "r", num_tokens=1, step_ms=12.0)
    assert step_ms_of(times, "r", 1) == pytest.approx(12, rel=0.1)
    assert 0 < times.of("r").ms_per_token < 0.2


def test_it_follows_a_change():
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for slope in (0.1, 1.0):
        for _ in range(600):
            num_tokens = rng.choice((16, 256, 1024))
            observe(times, "r", num_tokens=num_tokens, step_ms=5 + slope * num_tokens)
    assert times.of("r").ms_per_token == pytest.approx(1.0, rel=0.05)


def test_a_straggler_is_slower_and_a_newcomer_is_average():
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for _ in range(300):
        num_tokens = rng.choice((16, 256, 1024))
        observe(times, "normal", num_tokens=num_tokens, step_ms=10 + 0.1 * num_tokens)
        observe(times, "straggler", num_tokens=num_tokens, step_ms=3 * (10 + 0.1 * num_tokens))
    normal, straggler, new = (step_ms_of(times, name, 512) for name in ("normal", "straggler", "new"))
    assert straggler / normal == pytest.approx(3, rel=0.2)
    assert normal < new < straggler
    times.forget("straggler")
    assert times.of("straggler") == times.of("new")


def test_steps_that_say_nothing_change_nothing():
    times = StepTimes(prior=PRIOR)
    observe(times, "r", num_tokens=0, step_ms=5.0)
    observe(times, "r", num_tokens=5, step_ms=0.0)
    assert times.of("r") == PRIOR


def test_a_pause_of_the_machine_moves_neither_the_line_nor_the_replica():
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for number in range(600):
        num_tokens = rng.choice((16, 256, 1024))
        step_ms = 10 + 0.1 * num_tokens
        observe(times, ("r", "s")[number % 2], num_tokens=num_tokens, step_ms=5000 if number % 100 == 0 else step_ms)
    assert step_ms_of(times, "r", 16) == pytest.approx(11.6, rel=0.2)
    assert step_ms_of(times, "r", 1024) == pytest.approx(112.4, rel=0.2)
    assert step_ms_of(times, "r", 512) / step_ms_of(times, "s", 512) == pytest.approx(1, rel=0.1)


def test_the_first_steps_do_not_mark_a_replica_for_ever():
    """Measured against a wrong prior, and then without requests: it is average by what the others have shown since."""
    times = StepTimes(prior=PRIOR)
    observe(times, "unlucky", num_tokens=512, step_ms=500.0)
    for _ in range(400):
        observe(times, "busy", num_tokens=8, step_ms=4.0)
    assert step_ms_of(times, "unlucky", 8) / step_ms_of(times, "busy", 8) == pytest.approx(1, rel=0.1)


def test_a_replica_that_was_slow_and_gets_nothing_is_tried_again():
    times = StepTimes(prior=PRIOR)
    for _ in range(100):
        for name, step_ms in (("a", 10.0), ("b", 10.0), ("slow", 40.0)):
            observe(times, name, num_tokens=8, step_ms=step_ms)
    assert step_ms_of(times, "slow", 8) > 2 * step_ms_of(times, "a", 8)
    for _ in range(1000):
        for name in ("a", "b"):
            observe(times, name, num_tokens=8, step_ms=10.0)
    assert step_ms_of(times, "slow", 8) / step_ms_of(times, "a", 8) == pytest.approx(1, rel=0.05)


def test_rare_prefills_among_many_decode_steps_set_the_slope():
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for number in range(2000):
        num_tokens = 2048 if number % 200 == 0 else rng.randint(1, 32)
        observe(times, "r", num_tokens=num_tokens, step_ms=4 + 0.025 * num_tokens)
    assert times.of("r").ms_per_token == pytest.approx(0.025, rel=0.1)
    assert step_ms_of(times, "r", 16) == pytest.approx(4.4, rel=0.1)


def test_the_kind_of_its_steps_is_not_taken_for_a_replicas_speed():
    """Few steps on slow cores, far from the prior: one replica ran a long prompt, the other a short one. Both are as fast."""
    times = StepTimes(prior=PRIOR)
    for num_tokens in (43, *[1] * 8):
        observe(times, "short", num_tokens=num_tokens, step_ms=38 + 2.7 * num_tokens)
    for num_tokens in (512, 130, *[1] * 11):
        observe(times, "long", num_tokens=num_tokens, step_ms=38 + 2.7 * num_tokens)
    short, long = times.of("short"), times.of("long")
    assert long.decode_ms(1) / short.decode_ms(1) == pytest.approx(1, rel=0.01)
    assert long.ms_per_token == pytest.approx(2.7, rel=0.3)
