"""Limits of one tenant: requests in flight and tokens a minute, with retry times that hold."""

from __future__ import annotations

import random

import pytest
from pilotfish.common.errors import Overloaded
from pilotfish.scheduler.tenant_limits import TenantLimits, TokenBucket


def limits(*, requests=None, tokens=None):
    return TenantLimits("acme", max_requests=requests, max_tokens_per_minute=tokens)


def test_requests_in_flight_are_counted_and_refused():
    tenant = limits(requests=2)
    tenant.enter(0)
    tenant.enter(0)
    for now in (400, 800):
        tenant.leave(now)
        tenant.enter(now)
    times = []
    for caller in ("first", "second"):
        with pytest.raises(Overloaded, match="acme has 2 requests in flight, of the 2 that are its limit") as refused:
            tenant.enter(900, retry_key=caller)
        times.append(refused.value.retry_after_s)
    assert times == pytest.approx([0.3 + 1.6, 0.3 + 1.1 * 0.4 + 1.6]), "one ends every 400 ms"
    tenant.leave(1200)
    with pytest.raises(Overloaded, match="acme has 1 requests in flight"):
        tenant.enter(1300, retry_key="a newcomer")
    tenant.enter(2800, retry_key="first")
    assert tenant.num_in_flight == 2


def test_a_bucket_says_when_the_tokens_are_there():
    tenant = limits(tokens=6000)
    tenant.take_tokens(5900, 0)
    with pytest.raises(Overloaded, match="6000 tokens a minute") as refused:
        tenant.take_tokens(300, 0)
    assert refused.value.retry_after_s == pytest.approx(2.0)
    tenant.take_tokens(300, 2000)


def test_what_was_really_used_is_settled_at_the_end():
    tenant = limits(tokens=6000)
    tenant.enter(0)
    tenant.take_tokens(1000, 0)
    tenant.leave(0, tokens_taken=1000, tokens_used=9000)
    with pytest.raises(Overloaded) as refused:
        tenant.take_tokens(100, 0)
    assert refused.value.retry_after_s == pytest.approx(31.0), "3000 below zero and 100 above, at 100 a second"
    tenant.enter(0)
    tenant.leave(0, tokens_taken=8000, tokens_used=0)
    tenant.take_tokens(100, 0)


def test_a_request_larger_than_the_bucket_needs_a_full_one():
    bucket = TokenBucket(600)
    assert bucket.wait_ms(10_000, 0) == 0
    bucket.take(10_000, 0)
    assert bucket.wait_ms(1, 0) == pytest.approx((10_000 - 600 + 1) * 100)


def test_no_limit_is_no_limit():
    tenant = limits()
    for _ in range(1000):
        tenant.enter(0)
        tenant.take_tokens(1e9, 0)


@pytest.mark.parametrize("seed", range(10))
def test_a_bucket_lets_through_its_rate_and_one_burst(seed):
    """Over any time at most rate * time + capacity, whatever the arrivals; and a retry at the time given is let in."""
    rng = random.Random(seed)
    bucket, now, taken = TokenBucket(60_000), 0.0, 0.0
    for _ in range(2000):
        now += rng.expovariate(1 / 50)
        size = rng.choice((10, 100, 3000))
        wait_ms = bucket.wait_ms(size, now)
        if wait_ms:
            now += wait_ms
            assert bucket.wait_ms(size, now) < 1e-6
        bucket.take(size, now)
        taken += size
        assert taken <= 60_000 + now + 1e-3
