"""Who kills replicas is found, and nobody else ends."""

from __future__ import annotations

import random
from collections import Counter

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


def test_who_saw_others_die_has_twice_as_many_tries() -> None:
    suspects = Suspects(2)

    def kill(*aboard: str) -> list[bool]:
        for name in aboard:
            suspects.join(name, "r0")
        return [suspects.fail(name) for name in aboard]

    assert kill("a", "b", "c") == [True] * 3
    assert kill("a") == [False]  # alone among those that died
    suspects.clear("a")
    assert kill("b") == [False]
    suspects.clear("b")
    assert kill("d") == [True]
    assert kill("e") == [True]
    assert [kill("d") for _ in range(3)] == [[True], [True], [False]]
    suspects.clear("d")
    assert kill("e") == [True]  # three deaths without it that nobody else was found guilty of
    suspects.progress("e", suspects.clear_tokens)
    assert kill("e") == [True]
    assert kill("e") == [False]  # what was before its first failure does not count


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
    """Replicas of 40 places. A step in which a poisonous request would produce its second token kills its replica, and so does
    chance."""

    def __init__(self, requests: dict[str, int], num_replicas: int, *, dice: random.Random, risk: float = 0.0) -> None:
        """`requests`: how many tokens each will have; the poisonous are named so. `risk`: of a death by chance, each step."""
        self.dice, self.risk = dice, risk
        self.tries = Counter[str]()
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
        is_deadly = any(name.startswith("poison") and num_tokens for name, num_tokens in requests.items())
        if is_deadly or self.dice.random() < self.risk:
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
        self.tries.update(lost)
        for name in lost:
            if self.suspects.fail(name):
                self.returned.append(name, num_failures=self.suspects.num_failures(name))
            else:
                self.suspects.clear(name)
                self.condemned.add(name)


def serve(seed: int, *, num_replicas: int, num_poisonous: int, num_bystanders: int = 200, risk: float = 0.0) -> Fleet:
    """Until all have ended."""
    dice = random.Random(seed)
    names = [f"poison {i}" for i in range(num_poisonous)] + [f"bystander {i}" for i in range(num_bystanders)]
    dice.shuffle(names)
    fleet = Fleet({name: dice.randint(1, 60) for name in names}, num_replicas, dice=dice, risk=risk)
    for _ in range(100_000):
        for replica in fleet.running:
            fleet.fill(replica)
        if not any(fleet.running.values()):
            break
        for replica in fleet.running:
            fleet.step(replica)
    assert not fleet.suspects
    ended = {name for name, num_left in fleet.num_left.items() if num_left <= 0 and name.startswith("bystander")}
    assert ended | fleet.condemned == set(names)
    assert {f"poison {i}" for i in range(num_poisonous)} <= fleet.condemned
    return fleet


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_replicas", "num_poisonous"), [(1, 1), (3, 1), (3, 4), (8, 20)])
def test_poison_is_found_and_bystanders_end_well(seed: int, num_replicas: int, num_poisonous: int) -> None:
    fleet = serve(seed, num_replicas=num_replicas, num_poisonous=num_poisonous)
    assert len(fleet.condemned) == num_poisonous
    assert fleet.num_deaths <= (3 if num_poisonous == 1 else 6) * num_poisonous


@pytest.mark.parametrize("num_poisonous", [0, 2])
def test_chance_condemns_few_where_replicas_live_for_30_steps(num_poisonous: int) -> None:
    """A request takes as many steps itself. With `max_attempts` tries for all, chance condemned 44 of a thousand."""
    innocent = 0
    for seed in range(10):
        fleet = serve(seed, num_replicas=3, num_poisonous=num_poisonous, num_bystanders=1000, risk=1 / 30)
        assert fleet.num_deaths > 20
        assert all(fleet.tries[f"poison {i}"] <= 6 for i in range(num_poisonous))
        innocent += len(fleet.condemned) - num_poisonous
    assert innocent <= 20  # of 10,000
