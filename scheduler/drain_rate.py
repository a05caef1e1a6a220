"""How fast a line moves while something waits in it: from the last departures, and from what its owner expects of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_NUM_GAPS = 64
_MIN_GAP_MS = 0.01


@dataclass(frozen=True, slots=True)
class Pace:
    """What is expected of a line that has not shown it: the time until something leaves it, and between departures then."""

    wait_ms: float = 1000.0
    gap_ms: float = 1000.0


class DrainRate:
    """Times between departures that somebody waited for; idle time says nothing."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=_NUM_GAPS)
        self._since_ms: float | None = None

    def begin(self, now_ms: float) -> None:
        """Something waits from now on, and nothing did before."""
        self._since_ms = now_ms

    def departed(self, now_ms: float, *, has_waited: bool, is_empty: bool) -> None:
        """One left the line; one that did not have to wait says nothing about the rate."""
        if self._since_ms is not None and has_waited:
            self._gaps.append(now_ms - self._since_ms)
        self._since_ms = None if is_empty else now_ms

    def end(self) -> None:
        """Nothing waits any more, for another reason than a departure."""
        self._since_ms = None

    def wait_ms(self, now_ms: float, expected: Pace) -> float:
        """Until the next departure: what is left of the gaps that were longer than this one is already, on average; where none
        was, of the wait that is expected; where that is over, as long again."""
        standing_ms = self._standing_ms(now_ms)
        longer = [gap_ms for gap_ms in self._gaps if gap_ms > standing_ms] or [expected.wait_ms]
        left_ms = sum(longer) / len(longer) - standing_ms
        return max(left_ms if left_ms > 0 else standing_ms, _MIN_GAP_MS)

    def gap_ms(self, now_ms: float, expected: Pace) -> float:
        """Mean time between departures, as expected until one is seen; a line that stands still for longer than that is getting
        slower."""
        standing_ms = self._standing_ms(now_ms)
        if not self._gaps:
            return max(expected.gap_ms, standing_ms)
        total, num_gaps = sum(self._gaps), len(self._gaps)
        if standing_ms > total / num_gaps:
            total, num_gaps = total + standing_ms, num_gaps + 1
        return max(total / num_gaps, _MIN_GAP_MS)

    def _standing_ms(self, now_ms: float) -> float:
        return 0.0 if self._since_ms is None else now_ms - self._since_ms
