"""The bounded queue: order, classes, tenants' shares and places, refusal, and random operations against plain lists."""

from __future__ import annotations

import contextlib
import random

import pytest
from pilotfish.common.errors import InvalidRequest, Overloaded
from pilotfish.scheduler.admission import CLASS_WEIGHTS, AdmissionQueue, priority_class


def names(queue, now_ms=0):
    items = []
    while (item := queue.pop(now_ms)) is not None:
        items.append(item)
    return items


def push(queue, name, **options):
    queue.push(name, request_id=name, **{"now_ms": 0, **options})


def test_first_come_first_served_within_a_priority():
    queue = AdmissionQueue(max_queued=10)
    for number, priority in enumerate((0, 1, 0, 1)):
        push(queue, f"q{number}", priority=priority)
    assert names(queue) == ["q1", "q3", "q0", "q2"]


def test_aging_lets_nothing_starve():
    queue = AdmissionQueue(max_queued=10, aging_ms=100)
    push(queue, "old low", priority=0)
    push(queue, "high soon", now_ms=99, priority=1)
    push(queue, "high late", now_ms=101, priority=1)
    assert names(queue, 101) == ["high soon", "old low", "high late"]


def test_a_full_class_refuses_at_once_and_says_when_to_come_back():
    queue = AdmissionQueue(max_queued=3)
    for number in range(3):
        push(queue, f"{number}")
    for now in (250, 500):
        assert queue.pop(now) is not None
        push(queue, f"new {now}", now_ms=now)
    with pytest.raises(Overloaded, match=r"interactive requests is full: 3 of 3 places .* again in 1.2 s") as refused:
        push(queue, "one more", now_ms=500)
    assert refused.value.retry_after_s == 5 * 0.25, "a place every 250 ms, held for the time of four"
    assert queue.pop(750) is not None
    with pytest.raises(Overloaded):
        push(queue, "newcomer", now_ms=750, retry_key="newcomer")
    push(queue, "one more", now_ms=750)
    push(queue, "batch", priority=-1, now_ms=750)
    assert len(queue) == 4, "batch requests have places of their own"


def test_callers_that_never_come_back_hold_half_of_the_places_at_most():
    queue = AdmissionQueue(max_queued=20)
    now = refused = 0
    for number in range(3000):  # 1000 arrive and 500 leave a second, and no caller makes a second attempt
        now = number
        try:
            push(queue, f"{number}", now_ms=now, retry_key=f"{number}")
        except Overloaded:
            refused += 1
        if number % 2:
            assert queue.pop(now) is not None, "it never stands empty"
    assert 1400 < refused < 1600


def test_an_id_in_use_is_refused_and_a_removed_one_is_free():
    queue = AdmissionQueue(max_queued=5)
    push(queue, "same")
    with pytest.raises(InvalidRequest, match="same"):
        push(queue, "same")
    assert queue.remove("same") == "same"
    assert queue.remove("same") is None
    push(queue, "same")
    assert names(queue) == ["same"]


def test_removed_entries_do_not_pile_up():
    queue = AdmissionQueue(max_queued=5)
    push(queue, "stays")
    for number in range(10_000):
        push(queue, f"{number}", now_ms=number)
        queue.remove(f"{number}")
    (line,) = queue._classes["interactive"].waiting.values()
    assert len(line._heap) <= 100


def test_batch_work_gets_its_share_and_the_rest_of_an_idle_machine():
    queue = AdmissionQueue(max_queued=1000)
    for number in range(160):
        push(queue, f"i{number}")
        push(queue, f"b{number}", priority=-5)
    first = [queue.pop(0)[0] for _ in range(160)]
    assert first.count("b") == 10
    assert len(names(queue)) == 160


def test_a_tenant_that_sends_much_neither_fills_the_queue_nor_delays_another():
    queue = AdmissionQueue(max_queued=100, weights={"greedy": 1.0, "modest": 1.0})
    refused = 0
    for number in range(500):
        try:
            push(queue, f"g{number}", tenant="greedy", priority=99)
        except Overloaded:
            refused += 1
    assert len(queue) == 80
    assert refused == 420
    for number in range(10):
        push(queue, f"m{number}", tenant="modest", now_ms=1)
    order = "".join(name[0] for name in names(queue, 2))
    assert order[:20].count("m") == 10, "its requests take turns, whatever the other's priority"


def test_shares_are_of_true_cost():
    queue = AdmissionQueue(max_queued=10_000, weights={"long": 1.0, "short": 1.0})
    for number in range(1000):
        push(queue, f"long {number}", tenant="long", cost=10.0)
        push(queue, f"short {number}", tenant="short", cost=10.0)
    used = {"long": 0.0, "short": 0.0}
    for _ in range(400):
        tenant = queue.pop(0).partition(" ")[0]
        true_cost = 90.0 if tenant == "long" else 10.0
        queue.correct(true_cost - 10.0, tenant=tenant, priority=0)
        used[tenant] += true_cost
    assert abs(used["long"] - used["short"]) <= 100


def test_costs_of_a_tenant_that_is_away_are_corrected_too():
    queue = AdmissionQueue(max_queued=10)
    push(queue, "a", tenant="a")
    assert queue.pop(0) == "a"
    queue.correct(5.0, tenant="a", priority=0)
    push(queue, "again", tenant="a")
    push(queue, "b", tenant="b")
    assert names(queue) == ["b", "again"]


class NaiveQueue:
    """The same rules over plain lists: every choice is a search through all that waits."""

    def __init__(self, weights, aging_ms):
        self.weights, self.aging_ms = weights, aging_ms
        self.entries = []  # (class, tenant, key, name, cost)
        self.virtual = {}
        self.now = dict.fromkeys((*CLASS_WEIGHTS, "classes"), 0.0)

    def _activate(self, level, flow):
        self.virtual[level, flow] = max(self.virtual.get((level, flow), 0.0), self.now[level])

    def push(self, name, tenant, priority, now, number, cost):
        kind = priority_class(priority)
        if not any(entry[0] == kind for entry in self.entries):
            self._activate("classes", kind)
        if not any(entry[:2] == (kind, tenant) for entry in self.entries):
            self._activate(kind, tenant)
        self.entries.append((kind, tenant, (now - priority * self.aging_ms, number), name, cost))

    def correct(self, tenant, priority, difference):
        kind = priority_class(priority)
        self.virtual["classes", kind] += difference / CLASS_WEIGHTS[kind]
        self.virtual[kind, tenant] += difference / self.weights[tenant]

    def lowest_tenants(self):
        """The class that is next and its tenants with the lowest virtual time."""
        kinds = [kind for kind in CLASS_WEIGHTS if any(entry[0] == kind for entry in self.entries)]
        kind = min(kinds, key=lambda kind: self.virtual["classes", kind])
        tenants = {entry[1] for entry in self.entries if entry[0] == kind}
        lowest = min(self.virtual[kind, tenant] for tenant in tenants)
        return kind, {tenant for tenant in tenants if self.virtual[kind, tenant] == lowest}

    def take(self, name):
        """Charge for `name`, which must be the first of a tenant that is next."""
        kind, tenants = self.lowest_tenants()
        entry = next(entry for entry in self.entries if entry[3] == name)
        assert entry[0] == kind
        assert entry[1] in tenants
        assert entry == min((e for e in self.entries if e[:2] == entry[:2]), key=lambda e: e[2])
        self.entries.remove(entry)
        for level, flow, weight in (("classes", kind, CLASS_WEIGHTS[kind]), (kind, entry[1], self.weights[entry[1]])):
            self.now[level] = max(self.now[level], self.virtual[level, flow])
            self.virtual[level, flow] += entry[4] / weight
        return entry


@pytest.mark.parametrize("seed", range(15))
def test_random_operations_against_plain_lists(seed):
    rng = random.Random(seed)
    weights = {"a": 1.0, "b": 2.5, "c": 0.5}
    queue, naive = AdmissionQueue(max_queued=12, weights=weights, aging_ms=30), NaiveQueue(weights, 30)
    now, popped, retry_times = 0, [], []
    for number in range(600):
        now += rng.randrange(10)
        operation = rng.choice(("push", "push", "push", "pop", "pop", "remove", "correct"))
        if operation == "push":
            tenant, priority, cost = rng.choice("abc"), rng.choice((-2, -1, 0, 0, 0, 1, 7)), rng.uniform(0.1, 50)
            kind = priority_class(priority)
            held = sum(entry[:2] == (kind, tenant) for entry in naive.entries)
            free = 12 - sum(entry[0] == kind for entry in naive.entries)
            try:
                queue.push(f"{number}", request_id=f"{number}", now_ms=now, tenant=tenant, priority=priority, cost=cost)
                naive.push(f"{number}", tenant, priority, now, number, cost)
                assert free > 0
                assert held < max(1, 4 * free)
            except Overloaded as refused:
                is_full = free == 0 or held >= 4 * free
                promises = queue._classes[kind].line(tenant).promises
                assert is_full or promises.num_due(now) > 0 or len(promises) > 0
                retry_times.append(refused.retry_after_s)
        elif operation == "pop":
            name = queue.pop(now)
            if name is None:
                assert not naive.entries
            else:
                popped.append(naive.take(name))
        elif operation == "remove" and naive.entries:
            entry = naive.entries.pop(rng.randrange(len(naive.entries)))
            assert queue.remove(entry[3]) == entry[3]
        elif operation == "correct" and popped:
            kind, tenant, _, _, cost = popped.pop(rng.randrange(len(popped)))
            priority, difference = (0 if kind == "interactive" else -1), rng.uniform(-cost, 60)
            queue.correct(difference, tenant=tenant, priority=priority)
            naive.correct(tenant, priority, difference)
        assert len(queue) == len(naive.entries)
    assert all(0 < retry_after_s <= 600 for retry_after_s in retry_times)


@pytest.mark.parametrize("seed", range(5))
def test_nobody_starves(seed):
    """Two tenants flood the queue with urgent requests; a third's one batch request at the lowest weight still gets through."""
    rng = random.Random(seed)
    queue = AdmissionQueue(max_queued=50, weights={"a": 100.0, "b": 100.0, "small": 1.0}, aging_ms=1000)
    push(queue, "small", tenant="small", priority=-1000, cost=10.0)
    for number in range(100_000):
        tenant = rng.choice("ab")
        with contextlib.suppress(Overloaded):
            push(queue, f"{number}", tenant=tenant, priority=rng.choice((-1, 0, 5)), cost=rng.uniform(1, 20), now_ms=number)
        if queue.pop(number) == "small":
            break
    assert number < 5000
