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
