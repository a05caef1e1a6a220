"""How many replicas there should be: from what waits, what runs and how full the KV caches are, against a target wait.

Every look at the cluster (a `ScalingSample`) says between which two numbers the fleet should be now: at least so many that the
wait is within its target (where nothing waits: that they are at most `high_usage` full), at most so many that they would be
`low_usage` full. The fleet grows to what *every* look of the last `up_ticks` asked for, so a blip adds nothing, and shrinks to
the most that *any* look of the last `down_ticks` allowed: between the two numbers, and while the load swings faster than that,
nothing moves. Growing takes at most `max_growth` times as many at once; replicas that are starting count, and a wait that will
be short enough within `catch_up_ticks`, as it falls now, asks for nothing: so one cause is answered once. Shrinking takes one
at a time. The last replica goes only where none is allowed, after `idle_ticks` without any request, and comes back at the first
one. Ticks are the caller's milliseconds and never decrease.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """The policy's bounds and patience.

    Attributes:
        target_wait_ms: a request should not wait longer before its prompt is computed.
        high_usage, low_usage: of the places in the replicas' batches, and of their KV blocks.
        pause_ticks: after a removal, before the next one.
    """

    min_replicas: int
    max_replicas: int
    target_wait_ms: float
    down_ticks: int
    idle_ticks: int
    high_usage: float = 0.8
    low_usage: float = 0.6
    max_growth: float = 2.0
    up_ticks: int = 3_000
    catch_up_ticks: int = 30_000
    pause_ticks: int = 15_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingSample:
    """The cluster at one tick. Replicas that are to go do not count, nor does what runs on them.

    Attributes:
        num_ready: replicas that serve.
        num_starting: replicas that are to serve: new ones, those that wait for a node, lost ones that are started again.
        num_failed: replicas that could not be started.
        num_places: sequences that one replica runs at once.
        num_running: sequences on replicas. `num_queued`: those that wait for one. Without batch work (priority below 0).
        num_batch: sequences of batch work that run or wait: they keep the last replica, and add none.
        kv_usage: KV blocks that sequences hold, of all of the ready replicas', 0 to 1.
        wait_ms: how long a request that came now would wait before its prompt is computed.
    """

    tick: int
    num_ready: int
    num_starting: int
    num_failed: int
    num_places: int
    num_running: int
    num_queued: int
    num_batch: int
    kv_usage: float
    wait_ms: float


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """`num_wanted` replicas, and why in words."""

    num_wanted: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Look:
    """What one sample asks for. `need` says what `at_least` is for."""

    tick: int
    wait_ms: float
    at_least: int
    at_most: int
    need: str


class ScalingPolicy:
    """Remembers the looks of the last `down_ticks`."""

    def __init__(self, config: ScalingConfig) -> None:
        self._config = config
        self._looks: deque[_Look] = deque()
        self._last_busy_tick: int | None = None
        self._last_removal_tick: int | None = None

    def decide(self, sample: ScalingSample) -> ScalingDecision | None:
        """The number to change to now; None to leave it."""
        config, tick = self._config, sample.tick
        is_busy = sample.num_running + sample.num_queued + sample.num_batch > 0
        if is_busy or not sample.num_ready or self._last_busy_tick is None:  # who waits for a start may be about to ask
            self._last_busy_tick = tick
        self._looks.append(self._look(sample))
        while len(self._looks) > 1 and self._looks[1].tick <= tick - config.down_ticks:
            self._looks.popleft()
        num_now = sample.num_ready + sample.num_starting
        bound = min(max(num_now, config.min_replicas), config.max_replicas)
        if num_now > bound or (num_now < bound and not sample.num_failed):
            return ScalingDecision(bound, f"{config.min_replicas} to {config.max_replicas} replicas are allowed")
        if num_now == 0:
            wakes = is_busy and not sample.num_failed
            return ScalingDecision(1, "a request waits, and there is no replica") if wakes else None
        decision = self._more(sample, num_now) or self._fewer(sample, num_now, idle_ticks=tick - self._last_busy_tick)
        if decision is not None and decision.num_wanted < num_now:
            self._last_removal_tick = tick
        return decision

    def _look(self, sample: ScalingSample) -> _Look:
        """In replicas' worth of what is in use. Without a ready replica nothing is known, so nothing changes."""
        config, num_ready = self._config, sample.num_ready
        if num_ready == 0:
            return _Look(sample.tick, sample.wait_ms, sample.num_starting, sample.num_starting, "")
        places, blocks = sample.num_running / sample.num_places, sample.kv_usage * num_ready
        used = max(places, blocks)
        at_least, at_most = _ceil(used / config.high_usage), _ceil(used / config.low_usage)
        if sample.num_queued:
            at_least = min(at_least, num_ready)
        if blocks > places:
            need = f"{sample.kv_usage:.0%} of the KV blocks are in use"
        else:
            need = f"{sample.num_running} of {num_ready * sample.num_places} places are in use"
        excess = self._coming_wait_ms(sample) / config.target_wait_ms
        if excess > 1 and (by_wait := _ceil(num_ready * min(excess, config.max_growth))) > at_least:
            at_least = by_wait
            need = f"requests wait {sample.wait_ms / 1000:.1f} s, with {config.target_wait_ms / 1000:g} s as the target"
        if excess > 0.5:
            at_most = max(at_most, num_ready)
        lowest, highest = max(1, config.min_replicas), config.max_replicas
        at_least = min(max(at_least, lowest), highest)
        return _Look(sample.tick, sample.wait_ms, at_least, min(max(at_most, at_least), highest), need)

    def _coming_wait_ms(self, sample: ScalingSample) -> float:
        """The wait now, or, where it is falling, what it will be after `catch_up_ticks`."""
        config = self._config
        if not (looks := self._looks_of(config.up_ticks)):
            return sample.wait_ms
        before = looks[-1]
        slope = min(0.0, (sample.wait_ms - before.wait_ms) / (sample.tick - before.tick))
        return sample.wait_ms + slope * config.catch_up_ticks

    def _more(self, sample: ScalingSample, num_now: int) -> ScalingDecision | None:
        if self._looks[-1].at_least <= num_now or sample.num_failed:
            return None
        num_wanted = min((look.at_least for look in self._looks_of(self._config.up_ticks)), default=0)
        if num_wanted <= num_now:
            return None
        return ScalingDecision(min(num_wanted, int(num_now * self._config.max_growth)), self._looks[-1].need)

    def _fewer(self, sample: ScalingSample, num_now: int, *, idle_ticks: int) -> ScalingDecision | None:
        config, newest = self._config, self._looks[-1]
        if self._last_removal_tick is not None and sample.tick - self._last_removal_tick < config.pause_ticks:
            return None
        if config.min_replicas == 0 and num_now == 1 and idle_ticks >= config.idle_ticks:
            return ScalingDecision(0, f"no request for {config.idle_ticks / 1000:g} s")
        if newest.at_most >= num_now or max((k.at_most for k in self._looks_of(config.down_ticks)), default=num_now) >= num_now:
            return None
        return ScalingDecision(num_now - 1, f"fewer have been enough for {config.down_ticks / 1000:g} s; now {newest.need}")

    def _looks_of(self, num_ticks: int) -> list[_Look]:
        """Those that tell of the last `num_ticks`, the newest first; none where that is more than is known."""
        looks: list[_Look] = []
        for look in reversed(self._looks):
            looks.append(look)
            if look.tick <= self._looks[-1].tick - num_ticks:
                return looks
        return []


def _ceil(number: float) -> int:
    return math.ceil(number - 1e-9)
