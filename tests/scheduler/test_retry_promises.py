"""Retry times of a full queue: how often a caller that comes back when told to gets a place, in a simulated overload."""

from __future__ import annotations

import heapq
import itertools
import math
import random

import pytest
from pilotfish.common.errors import Overloaded
from pilotfish.scheduler.admission import AdmissionQueue
from pilotfish.scheduler.drain_rate import Pace
from pilotfish.scheduler.retry_promises import RetryPromises


def make(promises: RetryPromises, key: str, *, now_ms: float, wait_ms: float = 100) -> float:
    return promises.make(key, wait_ms=wait_ms, gap_ms=100, now_ms=now_ms)


def test_times_are_a_drained_place_apart_and_a_place_is_held_from_before_then_on():
    promises = RetryPromises(max_promises=3)
    assert [make(promises, key, now_ms=0) for key in ("a", "b", "")] == pytest.approx([500, 610, 720])
    assert make(promises, "a", now_ms=50) == 450, "it keeps its appointment"
    assert promises.num_due(99) == 0
    assert not promises.redeem("a", 99)
    assert promises.num_due(210) == 2
    assert promises.redeem("a", 210)
    assert not promises.redeem("a", 210)
    assert promises.num_due(210) == 1
    assert promises.redeem("", 350)
    assert promises.num_due(5609) == 1
    assert promises.num_due(5610) == 0, "b did not come"
    assert len(promises) == 0


def test_who_came_in_time_for_nothing_is_next():
    promises = RetryPromises(max_promises=3)
    for key in "abc":
        make(promises, key, now_ms=0)
    assert [make(promises, key, now_ms=720, wait_ms=300) for key in "ab"] == [300, 400], "in turn, not after c"
    assert promises.num_due(720) == 3, "their places are held already"
    assert promises.redeem("b", 720)
    assert promises.redeem("a", 720)


def test_promises_are_bounded_and_an_appointment_not_needed_is_void():
    promises = RetryPromises(max_promises=2)
    for key in "abcdef":
        make(promises, key, now_ms=0)
    assert len(promises) == 2
    promises.drop("a", 150)
    promises.drop("", 150)
    assert promises.num_due(150) == 0
    assert len(promises) == 1


class Overload:
    """A queue of 20 places before 4 servers of 10 requests/s in all. Who is refused comes back when told to, until let in."""

    def __init__(
        self,
        seed: int,
        *,
        whole_seconds: bool = False,
        has_key: bool = True,
        service_ms: tuple[float, float] = (200, 600),
    ) -> None:
        self.has_key = has_key
        self.rng = random.Random(seed)
        answer_ms = sum(service_ms) / 2
        self.queue: AdmissionQueue[int] = AdmissionQueue(max_queued=20, expected_pace=lambda: Pace(answer_ms, answer_ms / 4))
        self.whole_seconds = whole_seconds
        self.service_ms = service_ms
        self.now = 0.0
        self.events: list[tuple[float, int, str, int]] = []
        self.order = itertools.count()
        self.num_free = 4
        self.num_retries = self.num_admitted_retries = 0

    def at(self, time_ms: float, what: str, number: int = 0) -> None:
        heapq.heappush(self.events, (time_ms, next(self.order), what, number))

    def arrive(self, number: int, *, is_retry: bool) -> None:
        self.num_retries += is_retry
        key = f"call-{number}" if self.has_key else ""
        try:
            self.queue.push(number, request_id=str(number), now_ms=int(self.now), retry_key=key)
            self.num_admitted_retries += is_retry
        except Overloaded as refused:
            wait_s = math.ceil(refused.retry_after_s) if self.whole_seconds else refused.retry_after_s
            self.at(self.now + 1000 * wait_s + self.rng.uniform(1, 20), "retry", number)

    def ended(self, number: int) -> None:
        """For a load that reacts to it."""

    def run(self, until_ms: float) -> float:
        """The share of retries that got a place."""
        while self.events and self.events[0][0] < until_ms:
            self.now, _, what, number = heapq.heappop(self.events)
            if what == "end":
                self.num_free += 1
                self.ended(number)
            else:
                self.arrive(number, is_retry=what == "retry")
            while self.num_free and (item := self.queue.pop(int(self.now))) is not None:
                self.num_free -= 1
                self.at(self.now + self.rng.uniform(*self.service_ms), "end", item)
        assert self.num_retries > 50
        return self.num_admitted_retries / self.num_retries


class ClosedOverload(Overload):
    """Clients with one call at a time, which make the next one as soon as one ends."""

    def ended(self, number: int) -> None:
        self.at(self.now + 1, "new", number + 1_000_000)


def open_load(overload: Overload, *, per_s: float, seconds: int) -> None:
    time_ms = 0.0
    for number in range(int(per_s * seconds)):
        time_ms += overload.rng.expovariate(per_s / 1000)
        overload.at(time_ms, "new", number)


@pytest.mark.parametrize("per_s", [12, 20, 40])
@pytest.mark.parametrize(("whole_seconds", "has_key"), [(False, True), (True, True), (True, False)])
def test_a_retry_when_told_to_is_let_in_more_often_than_not(per_s, whole_seconds, has_key):
    """Who has no key may lose its place to another."""
    shares = []
    for seed in range(3):
        overload = Overload(seed, whole_seconds=whole_seconds, has_key=has_key)
        open_load(overload, per_s=per_s, seconds=60)
        shares.append(overload.run(10_000_000))
    print(f"{per_s}/s at a capacity of 10/s: {[f'{share:.2f}' for share in shares]} of the retries got a place")
    assert min(shares) > (0.8 if has_key else 0.5)


@pytest.mark.parametrize("whole_seconds", [False, True])
def test_equal_requests_that_came_at_once_end_at_once_and_are_told_so(whole_seconds):
    """Their places become free four at a time, every seven seconds; nothing has ended yet when most of them come."""
    overload = Overload(1, whole_seconds=whole_seconds, service_ms=(6900, 7100))
    for number in range(90):
        overload.at(10.0 * number, "new", number)
    cold = overload.run(10_000_000)
    took_s = overload.now / 1000
    overload.num_retries = overload.num_admitted_retries = 0
    for number in range(100, 190):
        overload.at(overload.now + 10.0 * (number - 100), "new", number)
    warm = overload.run(10_000_000)
    print(f"{cold:.2f} of the retries got a place, then {warm:.2f}; {took_s:.0f} s")
    assert min(cold, warm) > 0.8
    assert took_s < 1.2 * 90 / 4 * 7, "the servers had enough to do"


def test_clients_that_call_again_at_once_do_not_take_the_place_of_those_that_wait():
    overload = ClosedOverload(1)
    for number in range(60):
        overload.at(0.1 * number, "new", number)
    share = overload.run(120_000)
    print(f"60 clients on 24 places: {share:.2f} of the retries got a place")
    assert share > 0.8
