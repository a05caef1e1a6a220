"""The bounded queue in front of the replicas: by priority, then arrival, with aging; full means refused at once."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..common.errors import InvalidRequest, Overloaded
from .sequence import line_key

T = TypeVar("T")

_MAX_RETRY_AFTER_S = 60.0


@dataclass(slots=True)
class _Entry(Generic[T]):
    request_id: str
    item: T
    key: tuple[int, int]
    deadline_ms: float | None


class AdmissionQueue(Generic[T]):
    """At most `max_queued` items. One step of priority is worth `aging_ms` of waiting, so nothing starves.

    Times are milliseconds of the caller's clock. `remove`d entries stay in the heaps until they come up or are too many.
    """

    def __init__(self, *, max_queued: int, aging_ms: int = 10_000) -> None:
        self._max_queued = max_queued
        self._aging_ms = aging_ms
        self._entries: dict[str, _Entry[T]] = {}
        self._line: list[tuple[tuple[int, int], _Entry[T]]] = []
        self._deadlines: list[tuple[float, tuple[int, int], _Entry[T]]] = []
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def push(
        self,
        item: T,
        *,
        request_id: str,
        now_ms: int,
        priority: int = 0,
        deadline_ms: float | None = None,
        served_per_s: float = 0.0,
    ) -> None:
        """Queue an item. `deadline_ms` is a time, not a span; `served_per_s` is how fast the queue moves, for the retry hint.

        Raises:
            Overloaded: the queue is full; `retry_after_s` is the time it takes to serve what is queued, at most a minute.
            InvalidRequest: an item of this id is queued.
        """
        if request_id in self._entries:
            raise InvalidRequest(f"request id {request_id!r} is in use; give every request its own")
        if len(self._entries) >= self._max_queued:
            wait_s = len(self._entries) / served_per_s if served_per_s > 0 else _MAX_RETRY_AFTER_S
            retry_after_s = min(wait_s, _MAX_RETRY_AFTER_S)
            message = f"{self._max_queued} requests are queued already; try again in {retry_after_s:.1f} s"
            raise Overloaded(message, retry_after_s=retry_after_s)
        key = line_key(priority, arrival_tick=now_ms, arrival=self._num_pushed, aging_ticks=self._aging_ms)
        self._num_pushed += 1
        entry = _Entry(request_id, item, key, deadline_ms)
        self._entries[request_id] = entry
        heapq.heappush(self._line, (key, entry))
        if deadline_ms is not None:
            heapq.heappush(self._deadlines, (deadline_ms, key, entry))

    def pop_ready(self, now_ms: float) -> T | None:
        """The next item whose deadline has not passed; those that have are left for `expired`."""
        while self._line:
            _, entry = heapq.heappop(self._line)
            if self._entries.get(entry.request_id) is not entry or (
                entry.deadline_ms is not None and entry.deadline_ms <= now_ms
            ):
                continue
            del self._entries[entry.request_id]
            return entry.item
        return None

    def remove(self, request_id: str) -> T | None:
        """Take an item out of the queue; None if it is not there."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return None
        self._prune()
        return entry.item

    def expired(self, now_ms: float) -> list[T]:
        """Take out the items whose deadline has passed, earliest first."""
        items = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            _, _, entry = heapq.heappop(self._deadlines)
            if self._entries.get(entry.request_id) is entry:
                del self._entries[entry.request_id]
                items.append(entry.item)
        return items

    def _prune(self) -> None:
        if len(self._line) + len(self._deadlines) <= 4 * len(self._entries) + 64:
            return
        alive = self._entries
        self._line = [pair for pair in self._line if alive.get(pair[1].request_id) is pair[1]]
        self._deadlines = [triple for triple in self._deadlines if alive.get(triple[2].request_id) is triple[2]]
        heapq.heapify(self._line)
        heapq.heapify(self._deadlines)
