"""The bounded queue in front of the replicas: two classes, fair shares between tenants in each, priorities inside a tenant.

- Class: `interactive` from priority 0, `batch` below it. Each has places of its own and a share of the service (15 to 1 while
  both wait), so batch work fills what is left and never stands still.
- Tenant: while several wait in a class, each is served by its weight in what its requests truly cost (`FairShares`). A priority
  cannot win anything from another tenant.
- Priority: inside a tenant, higher first; one step is worth `aging_ms` of waiting, so nothing starves.

A full class refuses at once, with the time at which a place is held for the caller (`RetryPromises`). One tenant of several may
take four times the places that stay free and no more, so that there is room for the others when they come.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from ..common.errors import InvalidRequest, Overloaded
from .drain_rate import DrainRate, Pace
from .fair_shares import FairShares
from .retry_promises import RetryPromises
from .sequence import line_key

T = TypeVar("T")

INTERACTIVE, BATCH = "interactive", "batch"
CLASS_WEIGHTS: Mapping[str, float] = {INTERACTIVE: 15.0, BATCH: 1.0}
_TIMES_FREE = 4
_MAX_PROMISES = 16_384


def priority_class(priority: int) -> str:
    return INTERACTIVE if priority >= 0 else BATCH


class _Entry(Generic[T]):
    __slots__ = ("cost", "is_over", "item", "line", "pushed_ms", "request_id")

    def __init__(self, request_id: str, item: T, line: _Line[T], *, cost: float, pushed_ms: int) -> None:
        self.request_id = request_id
        self.item = item
        self.line = line
        self.cost = cost
        self.pushed_ms = pushed_ms
        self.is_over = False


class _Line(Generic[T]):
    """One tenant's entries of one class: a heap, with those that were removed until they come up or are too many."""

    def __init__(self, tenant: str, class_name: str) -> None:
        self.tenant = tenant
        self.class_name = class_name
        self.num_entries = 0
        self.drain = DrainRate()
        self.promises = RetryPromises(max_promises=_MAX_PROMISES)
        self._heap: list[tuple[tuple[int, int], _Entry[T]]] = []

    def push(self, key: tuple[int, int], entry: _Entry[T]) -> None:
        if not self.num_entries:
            self.drain.begin(entry.pushed_ms)
        heapq.heappush(self._heap, (key, entry))
        self.num_entries += 1

    def pop(self, now_ms: float) -> _Entry[T]:
        while True:
            _, entry = heapq.heappop(self._heap)
            if not entry.is_over:
                self.num_entries -= 1
                self.drain.departed(now_ms, has_waited=entry.pushed_ms < now_ms, is_empty=not self.num_entries)
                return entry

    def remove(self, entry: _Entry[T]) -> None:
        entry.is_over = True
        self.num_entries -= 1
        if not self.num_entries:
            self.drain.end()
        if len(self._heap) > 2 * self.num_entries + 32:
            self._heap = [pair for pair in self._heap if not pair[1].is_over]
            heapq.heapify(self._heap)


class _Class(Generic[T]):
    """The lines of one class; `waiting` are those with entries."""

    def __init__(self, name: str, max_queued: int, weights: Mapping[str, float]) -> None:
        self.max_queued = max_queued
        self.shares = FairShares(weights)
        self.waiting: dict[str, _Line[T]] = {}
        self.num_entries = 0
        self._name = name
        self._is_shared = len(weights) > 1
        self._lines: dict[str, _Line[T]] = {}

    def line(self, tenant: str) -> _Line[T]:
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line(tenant, self._name)
        return line

    def take_place(self, line: _Line[T], key: str, now_ms: float) -> bool:
        """Whether there is a place for this caller, with its appointment or without."""
        room = self.max_queued - self.num_entries
        if self._is_shared:  # so many more that the tenant then has at most _TIMES_FREE times what is free
            room = min(room, -((line.num_entries - _TIMES_FREE * room) // (_TIMES_FREE + 1)))
        return line.promises.lets_in(key, now_ms, num_free=room, max_held=self.max_queued // 2)  # many may not come back


class AdmissionQueue(Generic[T]):
    """At most `max_queued` items of each class, and what belongs to the last of them.

    `weights` are those of the tenants that may come; others weigh 1. Times are milliseconds of the caller's clock and never
    decrease. Costs are in any one unit. `expected_pace` is asked for what the line has not shown yet.
    """

    def __init__(
        self,
        *,
        max_queued: int,
        weights: Mapping[str, float] | None = None,
        aging_ms: int = 10_000,
        expected_pace: Callable[[], Pace] = Pace,
    ) -> None:
        self._aging_ms = aging_ms
        self._expected_pace = expected_pace
        self._classes: dict[str, _Class[T]] = {name: _Class(name, max_queued, weights or {}) for name in CLASS_WEIGHTS}
        self._class_shares = FairShares(CLASS_WEIGHTS)
        self._entries: dict[str, _Entry[T]] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def push(
        self,
        item: T,
        *,
        request_id: str,
        now_ms: int,
        tenant: str = "",
        priority: int = 0,
        cost: float = 1.0,
        retry_key: str = "",
        is_more: bool = False,
    ) -> None:
        """Queue an item.

        Args:
            cost: an estimate, charged when the item is popped; `correct` it when the true one is known.
            retry_key: tells this caller's attempts from those of others of its tenant.
            is_more: of a call that has a place already, and is let in whole: it needs no other.

        Raises:
            Overloaded: there is no place; `retry_after_s` says when one is held for this caller.
            InvalidRequest: an item of this id is queued.
        """
        if request_id in self._entries:
            raise InvalidRequest(f"request id {request_id!r} is in use; give every request its own")
        class_name = priority_class(priority)
        queue = self._classes[class_name]
        line = queue.line(tenant)
        if not is_more and not queue.take_place(line, retry_key, now_ms):
            raise self.refusal(tenant, priority=priority, retry_key=retry_key, now_ms=now_ms)
        if not queue.num_entries:
            self._class_shares.activate(class_name)
        if not line.num_entries:
            queue.shares.activate(tenant)
            queue.waiting[tenant] = line
        key = line_key(priority, arrival_tick=now_ms, arrival=self._num_pushed, aging_ticks=self._aging_ms)
        self._num_pushed += 1
        entry = _Entry(request_id, item, line, cost=cost, pushed_ms=now_ms)
        self._entries[request_id] = entry
        line.push(key, entry)
        queue.num_entries += 1

    def refusal(self, tenant: str, *, priority: int, retry_key: str, now_ms: float) -> Overloaded:
        """The error of a caller that gets no place now, with the time from which one is held for it."""
        class_name = priority_class(priority)
        queue = self._classes[class_name]
        line = queue.line(tenant)
        expected = self._expected_pace()
        wait_ms, gap_ms = line.drain.wait_ms(now_ms, expected), line.drain.gap_ms(now_ms, expected)
        retry_after_s = line.promises.make(retry_key, wait_ms=wait_ms, gap_ms=gap_ms, now_ms=now_ms) / 1000
        counts = f"{queue.num_entries} of {queue.max_queued} places are taken, {line.num_entries} of them by this tenant"
        message = f"the queue of {class_name} requests is full: {counts}; try again in {retry_after_s:.1f} s"
        return Overloaded(message, retry_after_s=retry_after_s)

    def pop(self, now_ms: float) -> T | None:
        """The next item, charged to its tenant; None if nothing is queued."""
        if not self._entries:
            return None
        class_name = self._class_shares.first(name for name, queue in self._classes.items() if queue.num_entries)
        queue = self._classes[class_name]
        tenant = queue.shares.first(queue.waiting)
        entry = queue.waiting[tenant].pop(now_ms)
        self._left(entry)
        self._class_shares.charge(class_name, entry.cost)
        queue.shares.charge(tenant, entry.cost)
        return entry.item

    def num_of(self, class_name: str) -> int:
        """Items of one class."""
        return self._classes[class_name].num_entries

    def oldest_wait_ms(self, class_name: str, now_ms: int) -> int:
        """How long the item of a class that came first has waited; 0 without one."""
        came = (entry.pushed_ms for entry in self._entries.values() if entry.line.class_name == class_name)
        return now_ms - next(came, now_ms)

    def correct(self, difference: float, *, tenant: str, priority: int) -> None:
        """An item of this tenant and priority that was popped, or never queued here, costs `difference` more than charged."""
        class_name = priority_class(priority)
        self._class_shares.correct(class_name, difference)
        self._classes[class_name].shares.correct(tenant, difference)

    def remove(self, request_id: str) -> T | None:
        """Take an item out of the queue, uncharged; None if it is not there."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        entry.line.remove(entry)
        self._left(entry)
        return entry.item

    def _left(self, entry: _Entry[T]) -> None:
        del self._entries[entry.request_id]
        queue = self._classes[entry.line.class_name]
        queue.num_entries -= 1
        if not entry.line.num_entries:
            del queue.waiting[entry.line.tenant]
