"""The last choices of the router, by the request they were made for."""

from __future__ import annotations

from collections import deque

from ..common.routing import RouteDecision


class DecisionLog:
    """At most `max_decisions`; the oldest leave first."""

    def __init__(self, *, max_decisions: int) -> None:
        self._max_decisions = max_decisions
        self._line: deque[RouteDecision] = deque()
        self._by_request: dict[str, deque[RouteDecision]] = {}

    def __len__(self) -> int:
        return len(self._line)

    def add(self, decision: RouteDecision) -> None:
        self._line.append(decision)
        self._by_request.setdefault(decision.request_id, deque()).append(decision)
        if len(self._line) > self._max_decisions:
            oldest = self._line.popleft()
            of_request = self._by_request[oldest.request_id]
            of_request.popleft()
            if not of_request:
                del self._by_request[oldest.request_id]

    def of(self, request_id: str) -> tuple[RouteDecision, ...]:
        """Oldest first; empty where none is kept."""
        return tuple(self._by_request.get(request_id, ()))
