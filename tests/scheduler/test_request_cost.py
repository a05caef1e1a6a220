"""The cost of a request: its three parts, each where it should grow."""

from __future__ import annotations

import pytest
from pilotfish.scheduler.request_cost import request_cost_ms
from pilotfish.scheduler.step_times import StepTime


def cost(**changes):
    values = {"num_prompt": 1000, "num_cached": 0, "num_output": 100, "num_active": 10, "kv_capacity_tokens": 10_000}
    return request_cost_ms(StepTime.line(10.0, 0.1), **(values | changes))


def test_the_parts_add_up():
    prefill, decode = 1000 * 0.1, 100 * (10 / 10 + 0.1)
    residency = (1000 + 50) / 10_000 * (100 + 100 * (10 + 1))
    assert cost() == pytest.approx(prefill + decode + residency)


def test_a_cached_prompt_costs_its_residency_only():
    cached = cost(num_cached=999, num_output=0)
    assert cached < 1.0
    assert cost(num_output=0) > 100 * cached
    assert cost(num_cached=999) > cost(num_prompt=10)


def test_steps_that_many_share_cost_each_less():
    assert cost(num_active=1) > cost(num_active=10)
    assert cost(num_active=0) == cost(num_active=1)


def test_what_holds_a_small_cache_costs_more_and_at_most_the_machine():
    assert cost(kv_capacity_tokens=2_000) > cost()
    assert cost(kv_capacity_tokens=1) == cost(kv_capacity_tokens=1000)
