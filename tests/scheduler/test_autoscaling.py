"""The scaling policy on simulated time: a cluster of places, arrivals by the second, replicas that take time to start."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import pytest
from pilotfish.scheduler.autoscaling import ScalingConfig, ScalingDecision, ScalingPolicy, ScalingSample

CONFIG = {"min_replicas": 1, "max_replicas": 10, "target_wait_ms": 1000.0, "down_ticks": 120_000, "idle_ticks": 300_000}
PLACES = 10
TICK_MS = 500


class Cluster:
    """`rate(second)` sequences arrive a second and each holds a place for `service_s`; a replica serves `start_s` after it was
    wanted. What runs on a replica that goes ends there."""

    def __init__(
        self, rate: Callable[[float], float], *, service_s: float = 4.0, start_s: float = 20.0, batch: int = 0, **config: object
    ) -> None:
        self.policy = ScalingPolicy(ScalingConfig(**{**CONFIG, **config}))
        self.rate, self.service_ms, self.start_ms, self.batch = rate, int(service_s * 1000), int(start_s * 1000), batch
        self.now = 0
        self.ready = max(1, self.policy._config.min_replicas)
        self.starting: list[int] = []
        self.failed = 0
        self.kv_usage: float | None = None
        self.queue: deque[int] = deque()
        self.running: deque[int] = deque()  # when each ends, in order: all take as long
        self.leaving: deque[int] = deque()
        self.decisions: list[tuple[float, int, ScalingDecision]] = []
        self.waits: list[tuple[float, float]] = []  # second of arrival, ms
        self._due = 0.0

    @property
    def num_replicas(self) -> int:
        return self.ready + len(self.starting)

    def run(self, seconds: float) -> Cluster:
        end = self.now + seconds * 1000
        while self.now < end:
            self._tick()
        return self

    def _tick(self) -> None:
        self.now += TICK_MS
        self.ready += sum(due <= self.now for due in self.starting)
        self.starting = [due for due in self.starting if due > self.now]
        while self.running and self.running[0] <= self.now:
            self.running.popleft()
        while self.leaving and self.leaving[0] <= self.now:
            self.leaving.popleft()
        self._due += self.rate(self.now / 1000) * TICK_MS / 1000
        while self._due >= 1:
            self.queue.append(self.now)
            self._due -= 1
        while self.queue and len(self.running) < self.ready * PLACES:
            arrival = self.queue.popleft()
            self.waits.append((arrival / 1000, self.now - arrival))
            self.running.append(self.now + self.service_ms)
        usage = len(self.running) / (PLACES * self.ready) / 2 if self.ready else 0.0
        decision = self.policy.decide(
            ScalingSample(
                tick=self.now,
                num_ready=self.ready,
                num_starting=len(self.starting),
                num_failed=self.failed,
                num_places=PLACES,
                num_running=len(self.running),
                num_queued=len(self.queue),
                num_batch=self.batch,
                kv_usage=usage if self.kv_usage is None else self.kv_usage,
                wait_ms=self.now - self.queue[0] if self.queue else 0.0,
            )
        )
        if decision is not None:
            self._follow(decision)

    def _follow(self, decision: ScalingDecision) -> None:
        assert decision.num_wanted != self.num_replicas
        assert decision.reason
        self.decisions.append((self.now / 1000, self.num_replicas, decision))
        for _ in range(decision.num_wanted - self.num_replicas):
            self.starting.append(self.now + self.start_ms)
        for _ in range(self.num_replicas - decision.num_wanted):
            if self.starting:
                self.starting.pop()
            else:
                self.ready -= 1
                for _ in range(len(self.running) - self.ready * PLACES):
                    self.leaving.append(self.running.popleft())

    def moves(self) -> list[int]:
        """The changes of the number, in order."""
        return [decision.num_wanted - before for _, before, decision in self.decisions]

    def worst_wait_s(self, since: float, until: float = math.inf) -> float:
        return max((wait / 1000 for second, wait in self.waits if since <= second < until), default=0.0)


def test_a_steady_load_finds_its_number_and_stays() -> None:
    cluster = Cluster(lambda second: 10.0).run(600)  # 40 places are held all the time
    assert 5 <= cluster.num_replicas <= 7  # 5 would be 80 % full, 7 are 57 %
    assert cluster.worst_wait_s(since=120) <= 0.5
    settled = len(cluster.decisions)
    cluster.run(3600)
    assert len(cluster.decisions) == settled


def test_up_fast_and_down_slow() -> None:
    cluster = Cluster(lambda second: 1.0 if second < 60 or second >= 400 else 16.0).run(400)
    ups = [(second, decision) for second, _, decision in cluster.decisions]
    assert ups[0][0] <= 66  # the load came at 60; what must hold for 3 s is seen half a second later
    assert "requests wait" in ups[0][1].reason
    assert 8 <= cluster.num_replicas <= 10
    assert cluster.worst_wait_s(since=250, until=400) <= 0.5
    cluster.run(1200)
    downs = [(second, decision) for second, _, decision in cluster.decisions if second >= 400]
    assert downs[0][0] >= 400 + 120
    assert all(after[0] - before[0] >= 15 for before, after in pairwise(downs))
    assert [decision.num_wanted for _, decision in downs] == list(range(cluster.decisions[-len(downs)][1] - 1, 0, -1))
    assert cluster.num_replicas == 1


def test_growth_is_limited_and_what_starts_counts() -> None:
    """One wave of waiting adds no more than as many again until the new ones serve."""
    cluster = Cluster(lambda second: 100.0, start_s=60.0, max_replicas=100).run(50)
    assert [(before, decision.num_wanted) for _, before, decision in cluster.decisions] == [(1, 2)]
    cluster.run(100)
    assert [(before, decision.num_wanted) for _, before, decision in cluster.decisions] == [(1, 2), (2, 4), (4, 8)]


def test_a_blip_adds_nothing() -> None:
    """Two seconds of too much, every half minute; what waits is done before it has waited for longer than it may."""
    cluster = Cluster(lambda second: 4.5 if second % 30 < 2 else 0.5, service_s=1.5).run(600)
    assert cluster.decisions == []


@pytest.mark.parametrize("period_s", [20, 60, 110])
def test_a_swinging_load_does_not_flap(period_s: float) -> None:
    """Replicas are there for the peaks of a load that swings faster than they are taken away."""
    cluster = Cluster(lambda second: 6 + 5 * math.sin(2 * math.pi * second / period_s), start_s=10.0).run(1800)
    moves = cluster.moves()
    signs = [move > 0 for move in moves]
    assert signs == sorted(signs, reverse=True), "nothing is added again once one was taken away"
    assert len(moves) <= 6
    assert cluster.worst_wait_s(since=300) <= 1.0


def test_a_slow_swing_is_followed_without_waits() -> None:
    cluster = Cluster(lambda second: 8 - 7 * math.cos(2 * math.pi * second / 3600)).run(3 * 3600)
    directions = [move > 0 for move in cluster.moves()]
    assert sum(before != after for before, after in pairwise(directions)) <= 6, "once up and once down an hour"
    assert cluster.worst_wait_s(since=0) <= 2.0


def test_bursts_at_random_keep_within_bounds() -> None:
    """Whatever comes: never outside the bounds, never up and down within a removal's patience, and the queue is worked off."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    rates = [rng.choice((0.0, 0.2, 3.0, 30.0)) * rng.random() for _ in range(200)]
    cluster = Cluster(lambda second: rates[int(second / 30) % 200] if second < 6000 else 0.0, start_s=rng.choice((2.0, 45.0)))
    for _ in range(700):
        cluster.run(10)
        assert 1 <= cluster.num_replicas <= 10
    moves = [(second, decision.num_wanted - before) for second, before, decision in cluster.decisions]
    for (earlier, first), (later, second) in pairwise(moves):
        assert not (first > 0 > second and later - earlier < 100), (earlier, later)
    assert not cluster.queue
    assert cluster.num_replicas == 1


def test_full_caches_add_replicas() -> None:
    """Few sequences, but long ones."""
    cluster = Cluster(lambda second: 0.5)
    cluster.kv_usage = 0.95
    cluster.run(5)
    (decision,) = [decision for *_, decision in cluster.decisions]
    assert decision.num_wanted == 2
    assert "95% of the KV blocks" in decision.reason


def test_batch_work_keeps_the_last_replica_and_adds_none() -> None:
    cluster = Cluster(lambda second: 0.0, min_replicas=0, batch=500).run(3600)
    assert cluster.decisions == []
    cluster.batch = 0
    cluster.run(299)
    assert cluster.num_replicas == 1
    cluster.run(2)
    assert cluster.num_replicas == 0


def test_to_zero_after_idleness_and_back_at_the_first_request() -> None:
    cluster = Cluster(lambda second: 1.0 if second < 60 or 1000 <= second < 1060 else 0.0, min_replicas=0).run(999)
    assert cluster.num_replicas == 0
    (second, _, decision) = cluster.decisions[-1]
    assert 360 <= second <= 370
    assert "no request" in decision.reason
    cluster.run(3)
    assert cluster.num_replicas == 1
    assert cluster.decisions[-1][0] <= 1002
    cluster.run(300)
    assert not cluster.queue
    assert 20.0 <= cluster.worst_wait_s(since=1000, until=1002) <= 21.0  # the start of a replica
    cluster.run(400)
    assert cluster.num_replicas == 0


def test_a_start_that_takes_long_is_no_idleness() -> None:
    cluster = Cluster(lambda second: 0.0, min_replicas=0)
    cluster.ready, cluster.starting = 0, [600_000]
    assert cluster.run(890).decisions == []
    assert cluster.run(15).num_replicas == 0


def test_without_leave_the_last_one_stays() -> None:
    assert Cluster(lambda second: 0.0).run(7200).decisions == []


def test_nothing_is_added_while_replicas_cannot_start() -> None:
    cluster = Cluster(lambda second: 10.0)
    cluster.failed = 1
    assert cluster.run(60).decisions == []
    cluster.failed = 0
    cluster.run(2)
    assert cluster.moves() == [1]


def test_a_number_outside_of_the_bounds_is_put_right_at_once() -> None:
    few, many = Cluster(lambda second: 0.0, min_replicas=3), Cluster(lambda second: 0.0, max_replicas=2)
    few.ready, many.ready = 1, 5
    assert few.run(1).num_replicas == 3
    assert many.run(1).num_replicas == 2
