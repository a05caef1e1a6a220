"""The learned cost of a step."""

from __future__ import annotations

import random

import pytest
from pilotfish.scheduler.step_times import StepTime, StepTimes

PRIOR = StepTime(10.0, 0.1)


def test_the_prior_holds_until_steps_are_seen():
    assert StepTimes(prior=PRIOR).of("r") == PRIOR


def test_the_line_is_learned_from_mixed_steps():
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for _ in range(300):
        num_tokens = rng.choice((1, 8, 64, 512, 2048))
        times.observe("r", num_tokens=num_tokens, step_ms=30 + 0.5 * num_tokens)
    learned = times.of("r")
    assert learned.ms_per_token == pytest.approx(0.5, rel=0.05)
    assert learned.step_ms(1) == pytest.approx(30, rel=0.2)


def test_equal_steps_do_not_make_a_wild_line():
    times = StepTimes(prior=PRIOR)
    for _ in range(300):
        times.observe("r", num_tokens=1, step_ms=12.0)
    assert times.of("r").step_ms(1) == pytest.approx(12, rel=0.1)
    assert 0 < times.of("r").ms_per_token < 0.2


def test_it_follows_a_change():
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for slope in (0.1, 1.0):
        for _ in range(600):
            num_tokens = rng.choice((16, 256, 1024))
            times.observe("r", num_tokens=num_tokens, step_ms=5 + slope * num_tokens)
    assert times.of("r").ms_per_token == pytest.approx(1.0, rel=0.05)


def test_a_straggler_is_slower_and_a_newcomer_is_average():
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for _ in range(300):
        num_tokens = rng.choice((16, 256, 1024))
        times.observe("normal", num_tokens=num_tokens, step_ms=10 + 0.1 * num_tokens)
        times.observe("straggler", num_tokens=num_tokens, step_ms=3 * (10 + 0.1 * num_tokens))
    normal, straggler, new = (times.of(name).step_ms(512) for name in ("normal", "straggler", "new"))
    assert straggler / normal == pytest.approx(3, rel=0.2)
    assert normal < new < straggler
    times.forget("straggler")
    assert times.of("straggler") == times.of("new")


def test_steps_that_say_nothing_change_nothing():
    times = StepTimes(prior=PRIOR)
    times.observe("r", num_tokens=0, step_ms=5.0)
    times.observe("r", num_tokens=5, step_ms=0.0)
    assert times.of("r") == PRIOR


def test_a_pause_of_the_machine_moves_neither_the_line_nor_the_replica():
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for number in range(600):
        num_tokens = rng.choice((16, 256, 1024))
        step_ms = 10 + 0.1 * num_tokens
        times.observe(("r", "s")[number % 2], num_tokens=num_tokens, step_ms=5000 if number % 100 == 0 else step_ms)
    assert times.of("r").step_ms(16) == pytest.approx(11.6, rel=0.2)
    assert times.of("r").step_ms(1024) == pytest.approx(112.4, rel=0.2)
    assert times.of("r").step_ms(512) / times.of("s").step_ms(512) == pytest.approx(1, rel=0.1)


def test_the_first_steps_do_not_mark_a_replica_for_ever():
    """Measured against a wrong prior, and then without requests: it is average by what the others have shown since."""
    times = StepTimes(prior=PRIOR)
    times.observe("unlucky", num_tokens=512, step_ms=500.0)
    for _ in range(400):
        times.observe("busy", num_tokens=8, step_ms=4.0)
    assert times.of("unlucky").step_ms(8) / times.of("busy").step_ms(8) == pytest.approx(1, rel=0.1)


def test_a_replica_that_was_slow_and_gets_nothing_is_tried_again():
    times = StepTimes(prior=PRIOR)
    for _ in range(100):
        for name, step_ms in (("a", 10.0), ("b", 10.0), ("slow", 40.0)):
            times.observe(name, num_tokens=8, step_ms=step_ms)
    assert times.of("slow").step_ms(8) > 2 * times.of("a").step_ms(8)
    for _ in range(1000):
        for name in ("a", "b"):
            times.observe(name, num_tokens=8, step_ms=10.0)
    assert times.of("slow").step_ms(8) / times.of("a").step_ms(8) == pytest.approx(1, rel=0.05)


def test_rare_prefills_among_many_decode_steps_set_the_slope():
    times, rng = StepTimes(prior=PRIOR), random.Random(0)
    for number in range(2000):
        num_tokens = 2048 if number % 200 == 0 else rng.randint(1, 32)
        times.observe("r", num_tokens=num_tokens, step_ms=4 + 0.025 * num_tokens)
    assert times.of("r").ms_per_token == pytest.approx(0.025, rel=0.1)
    assert times.of("r").step_ms(16) == pytest.approx(4.4, rel=0.1)


def test_the_kind_of_its_steps_is_not_taken_for_a_replicas_speed():
    """Few steps on slow cores, far from the prior: one replica ran a long prompt, the other a short one. Both are as fast."""
    times = StepTimes(prior=PRIOR)
    for num_tokens in (43, *[1] * 8):
        times.observe("short", num_tokens=num_tokens, step_ms=38 + 2.7 * num_tokens)
    for num_tokens in (512, 130, *[1] * 11):
        times.observe("long", num_tokens=num_tokens, step_ms=38 + 2.7 * num_tokens)
    short, long = times.of("short"), times.of("long")
    assert long.step_ms(1) / short.step_ms(1) == pytest.approx(1, rel=0.01)
    assert long.ms_per_token == pytest.approx(2.7, rel=0.3)
