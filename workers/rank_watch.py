"""Finds a rank that is stuck, by name, long before a collective times out.

Every follower beats: a thread of its own leaves a count in the group's store twice a second, with its last step and what it
does. The leader's watch reads them. A count that stands still means that the process is stopped, swapped out or cut off (a rank
that is slow in a step still beats); then `failure` says so, and the engine ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ..common.rank_place import RankPlace
from .comm import RankStore

logger = logging.getLogger(__name__)

BEAT_INTERVAL_S = 0.5
SILENT_LIMIT_S = 3.0


class Beat:
    """A follower's."""

    def __init__(self, place: RankPlace) -> None:
        self._place = place
        self._store = RankStore(place)
        self._state = "0 waiting"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-beat", daemon=True)
        self._thread.start()

    def say(self, step_id: int, phase: str) -> None:
        """For the next beats: the last step that came, and one word."""
        self._state = f"{step_id} {phase}"

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        count = 0
        while not self._closed.wait(BEAT_INTERVAL_S):
            count += 1
            try:
                self._store.tell(_key(self._place.rank), f"{count} {self._state} {self._place.host}")
            except RuntimeError as error:  # the leader's store is gone: so is the replica
                logger.warning("rank %d cannot beat: %s", self._place.rank, error)
                return


class RankWatch:
    """The leader's. `failure` is set once, and never taken back."""

    def __init__(self, place: RankPlace, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.failure = ""
        self._place = place
        self._clock = clock
        self._store = RankStore(place)
        self._closed = threading.Event()
        now = clock()
        self._last = dict.fromkeys(range(1, place.size), ("", now))
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(BEAT_INTERVAL_S):
            for rank in self._last:
                self._look_at(rank)
            if self.failure:
                logger.error("%s", self.failure)
                return

    def _look_at(self, rank: int) -> None:
        said, since_s = self._last[rank]
        now = self._clock()
        saying = self._store.told(_key(rank)) or ""
        if saying != said:
            self._last[rank] = (saying, now)
        elif now - since_s > SILENT_LIMIT_S:
            _, step_id, phase, host = saying.split() if saying else ("", "none", "starting", "an unknown node")
            self.failure = (
                f"rank {rank} on {host} has been silent for {now - since_s:.1f} s; its last step was {step_id} (phase {phase})"
            )


def _key(rank: int) -> str:
    return f"beat-{rank}"
