"""Appointments for those whom a full queue refused: when to come back, and the place that is then held for them.

A retry-after that is only an estimate is wrong under overload, however good the estimate: whoever comes first takes the place
that became free. So every refused caller gets a time of its own, one drained place after the last one's, and a place is held
for it from a few places earlier on and for a while afterwards (newcomers are refused meanwhile, with appointments of their
own). Held places cost no throughput while the rest of the queue is full; at most half of the queue is held, for those who may
not come back.

Callers are told apart by a key. Those without one cannot be: whichever of them comes next takes the earliest appointment.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import attrgetter

_GRACE_MS = 5_000.0  # HTTP's retry-after has whole seconds, and clients add jitter
_MAX_WAIT_MS = 600_000.0
_SPACING = 1.1  # gaps of the line from one appointment to the next, so that a line that slows a little keeps up
_EARLY = 4.0  # gaps for which a place is held before its caller comes: the line moves by fits and starts
_from_ms = attrgetter("from_ms")


@dataclass(slots=True)
class _Promise:
    """A place is held from `from_ms` on, until `until_ms`; the caller is told to come at `at_ms`."""

    from_ms: float
    at_ms: float
    key: str
    is_over: bool = False

    @property
    def until_ms(self) -> float:
        return self.at_ms + _GRACE_MS


class RetryPromises:
    """At most `max_promises` at a time; who is refused beyond them is told when the last of them is due, and has no place.

    Times are milliseconds and never decrease.
    """

    def __init__(self, *, max_promises: int) -> None:
        self._max_promises = max_promises
        self._later: list[_Promise] = []  # in the order of from_ms
        self._due: list[tuple[float, int, _Promise]] = []  # a heap, by until_ms
        self._by_key: dict[str, deque[_Promise]] = {}
        self._num_opened = 0
        self._num_due = 0
        self._num_open = 0
        self._last_from_ms = -math.inf
        self._last_late_ms = -math.inf

    def __len__(self) -> int:
        return self._num_open

    def num_due(self, now_ms: float) -> int:
        """Places to hold now."""
        self._advance(now_ms)
        return self._num_due

    def lets_in(self, key: str, now_ms: float, *, num_free: int, max_held: int) -> bool:
        """Whether one of the free places is for this caller, with its appointment or without; which is used up then."""
        if num_free <= 0:
            return False
        if self.redeem(key, now_ms):
            return True
        if num_free <= min(self.num_due(now_ms), max_held):
            return False
        self.drop(key, now_ms)
        return True

    def redeem(self, key: str, now_ms: float) -> bool:
        """Whether a place is held for this caller, which then has it."""
        self._advance(now_ms)
        promises = self._by_key.get(key)
        if not promises or promises[0].from_ms > now_ms:
            return False
        self._close(promises[0], is_due=True)
        return True

    def drop(self, key: str, now_ms: float) -> None:
        """This caller got a place without its appointment, which is void. Nothing for those without a key."""
        self._advance(now_ms)
        if key and (promises := self._by_key.get(key)):
            self._close(promises[0], is_due=promises[0].from_ms <= now_ms)

    def make(self, key: str, *, wait_ms: float, gap_ms: float, now_ms: float) -> float:
        """When the caller should be back: milliseconds from now. The line's next place comes in `wait_ms`, others `gap_ms`
        apart.

        A caller with a key has one appointment: too early, it keeps it; in time for a place that is not free after all, it
        keeps its turn, behind others that were.
        """
        self._advance(now_ms)
        held = self._by_key.get(key) if key else None
        if held and held[0].from_ms > now_ms:
            return held[0].at_ms - now_ms
        if held:
            self._close(held[0], is_due=True)
            from_ms = now_ms
            at_ms = self._last_late_ms = max(now_ms + wait_ms, self._last_late_ms + gap_ms)
        else:
            from_ms = max(now_ms + wait_ms, self._last_from_ms + _SPACING * gap_ms)
            at_ms = from_ms + _EARLY * gap_ms
        at_ms = min(at_ms, now_ms + _MAX_WAIT_MS)
        if self._num_open < self._max_promises and at_ms < now_ms + _MAX_WAIT_MS:
            self._open(_Promise(from_ms, at_ms, key))
            self._last_from_ms = max(self._last_from_ms, from_ms)
        return at_ms - now_ms

    def _open(self, promise: _Promise) -> None:
        insort(self._later, promise, key=_from_ms)
        self._by_key.setdefault(promise.key, deque()).append(promise)
        self._num_open += 1

    def _advance(self, now_ms: float) -> None:
        num_due = 0
        while num_due < len(self._later) and self._later[num_due].from_ms <= now_ms:
            promise = self._later[num_due]
            num_due += 1
            if not promise.is_over:
                self._num_due += 1
                self._num_opened += 1
                heappush(self._due, (promise.until_ms, self._num_opened, promise))
        del self._later[:num_due]
        while self._due and (self._due[0][2].is_over or self._due[0][0] <= now_ms):
            promise = heappop(self._due)[2]
            if not promise.is_over:
                self._close(promise, is_due=True)

    def _close(self, promise: _Promise, *, is_due: bool) -> None:
        """Used or not, it is over."""
        promise.is_over = True
        self._num_open -= 1
        self._num_due -= is_due
        promises = self._by_key[promise.key]
        promises.remove(promise)
        if not promises:
            del self._by_key[promise.key]
