"""Who kills replicas is found, and nobody else ends."""

from __future__ import annotations

import random

import pytest
from pilotfish.scheduler.return_queue import ReturnQueue
from pilotfish.scheduler.suspects import Suspects


def test_who_fails_is_suspected_until_it_gets_on() -> None:
    suspects = Suspects(3)
    assert not suspects
    assert suspects.fail("a")
    suspects.join("a", "r0")
    suspects.progress("a", suspects.clear_tokens - 1)
    assert suspects.num_failures("a") == 1
    assert suspects.fail("a")  # the tokens of one run do not count for the next
    suspects.join("a", "r1")
    suspects.progress("a", suspects.clear_tokens - 1)
    assert suspects.num_failures("a") == 2
    suspects.progress("a", 1)
    assert not suspects


def test_the_last_failure_allowed_ends_it() -> None:
    suspects = Suspects(2)
    assert suspects.fail("a")
    assert not suspects.fail("a")
    assert not Suspects(1).fail("a")


def test_suspects_run_apart_and_on_trial_alone() -> None:
    suspects = Suspects(3, group_size=2)
    for name in ("a", "b", "c"):
        suspects.fail(name)
    suspects.join("a", "r0")
    assert suspects.may_join(1, "r0")
    suspects.join("b", "r0")
    assert not suspects.may_join(1, "r0")
    assert suspects.may_join(0, "r0")
    assert suspects.may_join(1, "r1")
    assert not suspects.may_join(2, "r0")
    suspects.fail("a")
    suspects.fail("b")
    suspects.join("a", "r1")
    assert not any(suspects.may_join(number, "r1") for number in range(3))
    suspects.leave("a")
    assert suspects.num_failures("a") == 2
    assert suspects.may_join(0, "r1")


def test_returned_ones_that_failed_most_often_go_first() -> None:
    queue: ReturnQueue[str] = ReturnQueue()
    queue.extend(["a", "b"])
    queue.append("c", num_failures=2)
    queue.append("d", num_failures=1)
    queue.remove("d")
    queue.remove("nobody")
    assert list(queue) == ["c", "a", "b"]
    assert (len(queue), "a" in queue, "d" in queue) == (3, True, False)
    assert queue.pop(lambda num_failures: num_failures == 0) == "a"
    assert queue.pop() == "c"
    assert queue.pop(lambda num_failures: False) is None
    assert queue.pop() == "b"
    assert queue.pop() is None


class Fleet:
    """Replicas of 40 places. A step in which a poisonous request would produce its second token kills its replica."""

    def __init__(self, requests: dict[str, int], num_replicas: int) -> None:
        """`requests`: how many tokens each will have; the poisonous are named so."""
        self.suspects = Suspects(3)
        self.returned = ReturnQueue[str]()
        self.fresh = iter(list(requests))
        self.num_left = requests
        self.running: dict[str, dict[str, int]] = {f"r{i}": {} for i in range(num_replicas)}
        self.condemned: set[str] = set()
        self.num_deaths = 0

    def fill(self, replica: str) -> None:
        requests = self.running[replica]
        while len(requests) < 40:
            name = self.returned.pop(lambda num_failures: self.suspects.may_join(num_failures, replica))
            if name is None and self.suspects.may_join(0, replica):
                name = next(self.fresh, None)
            if name is None:
                return
            self.suspects.join(name, replica)
            requests[name] = 0

    def step(self, replica: str) -> None:
        requests = self.running[replica]
        if any(name.startswith("poison") and num_tokens for name, num_tokens in requests.items()):
            self.die(replica)
            return
        for name in list(requests):
            requests[name] += 1
            self.num_left[name] -= 1
            self.suspects.progress(name, 1)
            if self.num_left[name] <= 0 and not name.startswith("poison"):
                self.suspects.clear(name)
                del requests[name]

    def die(self, replica: str) -> None:
        self.num_deaths += 1
        lost, self.running[replica] = self.running[replica], {}
        for name in lost:
            if self.suspects.fail(name):
                self.returned.append(name, num_failures=self.suspects.num_failures(name))
            else:
                self.suspects.clear(name)
                self.condemned.add(name)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_replicas", "num_poisonous"), [(1, 1), (3, 1), (3, 4), (8, 20)])
def test_poison_is_found_and_bystanders_end_well(seed: int, num_replicas: int, num_poisonous: int) -> None:
    dice = random.Random(seed)
    names = [f"poison {i}" for i in range(num_poisonous)] + [f"bystander {i}" for i in range(200)]
    dice.shuffle(names)
    fleet = Fleet({name: dice.randint(1, 60) for name in names}, num_replicas)
    for _ in range(100_000):
        for replica in fleet.running:
            fleet.fill(replica)
        if not any(fleet.running.values()):
            break
        for replica in fleet.running:
            fleet.step(replica)
    assert fleet.condemned == {name for name in names if name.startswith("poison")}
    assert all(fleet.num_left[name] <= 0 for name in names if name.startswith("bystander"))
    assert fleet.num_deaths <= 3 * num_poisonous
    assert not fleet.suspects
