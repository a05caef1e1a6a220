"""Weighted fair shares of one resource: start-time fair queueing (Goyal, Vin and Chen, 1996) with costs corrected later.

Every flow has a virtual time: what it was charged, over its weight. The flow with the lowest is served next. The common virtual
time is the latest start of a service; a flow that comes back starts there at the earliest, so nobody saves up by being idle and
nobody pays for what was used while nobody else wanted it.

Two flows that both wait throughout differ by at most max_cost / weight of the one plus that of the other in what they get per
weight (theorem 1 there), plus what corrections of their services still under way change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..common.errors import ConfigError


class FairShares:
    """Flows that are not in `weights` weigh 1. A cost is in any unit, the same for all flows."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        for flow, weight in self._weights.items():
            if not weight > 0:
                raise ConfigError(f"the weight of {flow} must be above 0, not {weight}")
        self._virtual: dict[str, float] = {}
        self._now = 0.0

    def activate(self, flow: str) -> None:
        """The flow has something to serve and had nothing before."""
        self._virtual[flow] = max(self._virtual.get(flow, 0.0), self._now)

    def first(self, flows: Iterable[str]) -> str:
        """Who is served next of these, all active; of equal ones the first."""
        return min(flows, key=self._virtual.__getitem__)

    def charge(self, flow: str, cost: float) -> None:
        """The flow is served, at an estimated cost."""
        start = self._virtual[flow]
        self._now = max(self._now, start)
        self._virtual[flow] = start + cost / self.weight(flow)

    def correct(self, flow: str, difference: float) -> None:
        """A service cost `difference` more than was charged (less, if negative). It may have begun before these shares did."""
        self._virtual[flow] = self._virtual.get(flow, self._now) + difference / self.weight(flow)

    def weight(self, flow: str) -> float:
        return self._weights.get(flow, 1.0)
