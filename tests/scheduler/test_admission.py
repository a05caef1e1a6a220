"""The bounded queue: order, aging, refusal, deadlines, and random operations against a sorted list."""

from __future__ import annotations

import random

import pytest
from pilotfish.common.errors import InvalidRequest, Overloaded
from pilotfish.scheduler.admission import AdmissionQueue


def names(queue, now_ms=0):
    items = []
    while (item := queue.pop_ready(now_ms)) is not None:
        items.append(item)
    return items


def test_first_come_first_served_within_a_priority():
    queue = AdmissionQueue(max_queued=10)
    for number, priority in enumerate((0, 1, 0, 1)):
        queue.push(f"q{number}", request_id=f"q{number}", now_ms=0, priority=priority)
    assert names(queue) == ["q1", "q3", "q0", "q2"]


def test_aging_lets_nothing_starve():
    queue = AdmissionQueue(max_queued=10, aging_ms=100)
    queue.push("old low", request_id="a", now_ms=0, priority=0)
    queue.push("high soon", request_id="b", now_ms=99, priority=1)
    queue.push("high late", request_id="c", now_ms=101, priority=1)
    assert names(queue) == ["high soon", "old low", "high late"]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back():
    queue = AdmissionQueue(max_queued=2)
    for number in range(2):
        queue.push(number, request_id=f"{number}", now_ms=0)
    with pytest.raises(Overloaded, match="2 requests are queued") as refused:
        queue.push(2, request_id="2", now_ms=0, served_per_s=4.0)
    assert refused.value.retry_after_s == 0.5
    with pytest.raises(Overloaded) as refused:
        queue.push(2, request_id="2", now_ms=0)
    assert refused.value.retry_after_s == 60
    assert queue.pop_ready(0) == 0
    queue.push(2, request_id="2", now_ms=0)
    assert len(queue) == 2


def test_an_id_in_use_is_refused():
    queue = AdmissionQueue(max_queued=5)
    queue.push(1, request_id="same", now_ms=0)
    with pytest.raises(InvalidRequest, match="same"):
        queue.push(2, request_id="same", now_ms=0)
    assert queue.remove("same") == 1
    queue.push(2, request_id="same", now_ms=0)
    assert names(queue) == [2]


def test_removed_items_come_up_no_more():
    queue = AdmissionQueue(max_queued=5)
    for number in range(3):
        queue.push(number, request_id=f"{number}", now_ms=0)
    assert queue.remove("1") == 1
    assert queue.remove("1") is None
    assert len(queue) == 2
    assert names(queue) == [0, 2]


def test_expired_items_are_given_back_once_and_never_served():
    queue = AdmissionQueue(max_queued=5)
    queue.push("late", request_id="late", now_ms=0, deadline_ms=50, priority=9)
    queue.push("later", request_id="later", now_ms=0, deadline_ms=20)
    queue.push("fine", request_id="fine", now_ms=0, deadline_ms=500)
    queue.push("patient", request_id="patient", now_ms=0)
    assert queue.expired(10) == []
    assert queue.pop_ready(50) == "fine"
    assert len(queue) == 3, "the expired ones wait for `expired`"
    assert queue.expired(50) == ["later", "late"]
    assert queue.expired(50) == []
    assert names(queue) == ["patient"]


def test_removed_entries_do_not_pile_up():
    queue = AdmissionQueue(max_queued=5)
    for number in range(10_000):
        queue.push(number, request_id=f"{number}", now_ms=number, deadline_ms=1e9)
        queue.remove(f"{number}")
    assert len(queue._line) + len(queue._deadlines) <= 100


@pytest.mark.parametrize("seed", range(15))
def test_random_operations_against_a_sorted_list(seed):
    rng = random.Random(seed)
    queue = AdmissionQueue(max_queued=12, aging_ms=30)
    naive: list[tuple[int, int, str, float]] = []
    now = 0
    for number in range(300):
        now += rng.randrange(10)
        operation = rng.choice(("push", "push", "pop", "remove", "expired"))
        if operation == "push":
            priority, deadline = rng.randrange(3), now + rng.choice((20, 100, 10_000))
            try:
                queue.push(f"{number}", request_id=f"{number}", now_ms=now, priority=priority, deadline_ms=deadline)
                naive.append((now - 30 * priority, number, f"{number}", deadline))
            except Overloaded:
                assert len(naive) == 12
        elif operation == "pop":
            ready = sorted(entry for entry in naive if entry[3] > now)
            assert queue.pop_ready(now) == (ready[0][2] if ready else None)
            if ready:
                naive.remove(ready[0])
        elif operation == "remove" and naive:
            entry = naive.pop(rng.randrange(len(naive)))
            assert queue.remove(entry[2]) == entry[2]
        elif operation == "expired":
            gone = sorted((entry for entry in naive if entry[3] <= now), key=lambda entry: entry[3])
            assert sorted(queue.expired(now)) == sorted(entry[2] for entry in gone)
            naive = [entry for entry in naive if entry[3] > now]
        assert len(queue) == len(naive)
