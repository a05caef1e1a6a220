"""Appointments for those whom a full queue refused: when to come back, and the place that is then held for them.

A retry-after that is only an estimate is wrong under overload, however good the estimate: whoever comes first takes the place
that became free. So every refused caller gets a time of its own, one drained place after the last one's, and from then on a
place is held for it for a while (newcomers are refused meanwhile, with appointments of their own). Held places cost no
throughput while the rest of the queue is full; at most half of the queue is held, for those who may not come back.

Callers are told apart by a key. Those without one cannot be: whichever of them comes next takes the earliest appointment.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass
from operator import attrgetter

_GRACE_MS = 5_000.0  # HTTP's retry-after has whole seconds, and clients add jitter
_MAX_WAIT_MS = 600_000.0
_due_ms = attrgetter("due_ms")


@dataclass(slots=True)
class _Promise:
    due_ms: float
    key: str
    is_over: bool = False


class RetryPromises:
    """At most `max_promises` at a time; who is refused beyond them is told when the last of them is due, and has no place.

    Times are milliseconds and never decrease.
    """

    def __init__(self, *, max_promises: int) -> None:
        self._max_promises = max_promises
        self._later: list[_Promise] = []  # in the order of due_ms, as `_due` is
        self._due: deque[_Promise] = deque()
        self._by_key: dict[str, deque[_Promise]] = {}
        self._num_due = 0
        self._num_open = 0
        self._last_due_ms = 0.0

    def __len__(self) -> int:
        return self._num_open

    def num_due(self, now_ms: float) -> int:
        """Places to hold now."""
        self._advance(now_ms)
        return self._num_due

    def redeem(self, key: str, now_ms: float) -> bool:
        """Whether this caller has an appointment that is due, which is then used up."""
        self._advance(now_ms)
        promises = self._by_key.get(key)
        if not promises or promises[0].due_ms > now_ms:
            return False
        self._close(promises[0], is_due=True)
        return True

    def drop(self, key: str, now_ms: float) -> None:
        """This caller got a place without its appointment, which is void. Nothing for those without a key."""
        self._advance(now_ms)
        if key and (promises := self._by_key.get(key)):
            self._close(promises[0], is_due=promises[0].due_ms <= now_ms)

    def make(self, key: str, *, gap_ms: float, now_ms: float) -> float:
        """When the caller should be back: milliseconds from now.

        A caller with a key has one appointment: too early, it keeps it; in time for a place that is not free after all, it is
        the next to get one.
        """
        self._advance(now_ms)
        held = self._by_key.get(key) if key else None
        if held:
            due_ms = held[0].due_ms
            if due_ms <= now_ms:
                due_ms = now_ms + gap_ms
                self._close(held[0], is_due=True)
                self._open(_Promise(due_ms, key))
            return due_ms - now_ms
        due_ms = min(max(now_ms, self._last_due_ms) + gap_ms, now_ms + _MAX_WAIT_MS)
        if self._num_open < self._max_promises and due_ms < now_ms + _MAX_WAIT_MS:
            self._open(_Promise(due_ms, key))
            self._last_due_ms = due_ms
        return due_ms - now_ms

    def _open(self, promise: _Promise) -> None:
        insort(self._later, promise, key=_due_ms)
        self._by_key.setdefault(promise.key, deque()).append(promise)
        self._num_open += 1

    def _advance(self, now_ms: float) -> None:
        num_due = 0
        while num_due < len(self._later) and self._later[num_due].due_ms <= now_ms:
            num_due += 1
        if num_due:
            self._num_due += sum(not promise.is_over for promise in self._later[:num_due])
            self._due.extend(self._later[:num_due])
            del self._later[:num_due]
        while self._due and (self._due[0].is_over or self._due[0].due_ms + _GRACE_MS <= now_ms):
            promise = self._due.popleft()
            if not promise.is_over:
                self._close(promise, is_due=True)

    def _close(self, promise: _Promise, *, is_due: bool) -> None:
        """Used or not, it is over; it is the oldest of its key."""
        promise.is_over = True
        self._num_open -= 1
        self._num_due -= is_due
        promises = self._by_key[promise.key]
        assert promises.popleft() is promise
        if not promises:
            del self._by_key[promise.key]
