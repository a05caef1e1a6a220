"""When an engine is to pause because the controller cannot follow, and for how long it has.

Unacknowledged output that reaches a high mark pauses it, and what falls to a low mark lets it go on. A pause in place of an
abort: what waits for the controller would only come later still.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Backpressure:
    """`pause` is told of every change. Attributes: `is_paused`."""

    def __init__(self, *, pause_bytes: int, resume_bytes: int, pause: Callable[[bool], object]) -> None:
        assert resume_bytes < pause_bytes, f"the low mark {resume_bytes} is not below the high one {pause_bytes}"
        self.is_paused = False
        self._pause_bytes = pause_bytes
        self._resume_bytes = resume_bytes
        self._pause = pause
        self._spent_s = 0.0
        self._since_s = 0.0

    @property
    def paused_s(self) -> float:
        """Of all pauses, the present one too."""
        return self._spent_s + (time.monotonic() - self._since_s if self.is_paused else 0.0)

    def look_at(self, num_bytes: int) -> None:
        """At what is unacknowledged now."""
        if self.is_paused and num_bytes <= self._resume_bytes:
            self._spent_s, self.is_paused = self.paused_s, False
        elif not self.is_paused and num_bytes >= self._pause_bytes:
            self._since_s, self.is_paused = time.monotonic(), True
        else:
            return
        self._pause(self.is_paused)
