"""Finds a rank that is stuck, by name, long before a collective times out.

Every follower beats: a thread of its own leaves a count in the group's store twice a second, with its last step and what it
does. So does every leader, where there are several. A leader's watch reads the counts of its followers and of the other
leaders. One that stands still means that the process is stopped, swapped out or cut off (a rank that is slow in a step still
beats); then `failure` says so, and the engine ends. Silence is counted in looks of the watch, not in seconds: on a machine
that stood still, both stood still.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..common.rank_place import RankPlace
from .comm import RankStore

logger = logging.getLogger(__name__)

BEAT_INTERVAL_S = 0.5
MAX_SILENT_LOOKS = 6


class Beat:
    """A rank's own."""

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
                self._store.tell(_key(self._place.number), f"{count} {self._state} {self._place.host}")
            except RuntimeError as error:  # the leader's store is gone: so is the replica
                logger.warning("rank %d cannot beat: %s", self._place.number, error)
                return


class RankWatch:
    """A leader's. `failure` is set once, and never taken back; then `on_failure` is called, on the watch's thread."""

    def __init__(self, place: RankPlace, *, on_failure: Callable[[], None]) -> None:
        self.failure = ""
        self._on_failure = on_failure
        self._store = RankStore(place)
        self._closed = threading.Event()
        own, leaders = range(place.number + 1, place.number + place.size), range(0, place.num_ranks, place.size)
        self._heard = {number: _Heard() for number in (*own, *leaders) if number != place.number}
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(BEAT_INTERVAL_S):
            try:
                for rank, heard in self._heard.items():
                    self._look_at(rank, heard)
            except RuntimeError as error:  # the store is in this process: it goes with the replica
                logger.warning("the watch over the ranks ends: %s", error)
                return
            if self.failure:
                logger.error("%s", self.failure)
                self._on_failure()
                return

    def _look_at(self, rank: int, heard: _Heard) -> None:
        words = self._store.told(_key(rank)) or ""
        if words != heard.words:
            heard.words, heard.num_looks, heard.since_s = words, 0, time.monotonic()
            return
        heard.num_looks += 1
        if heard.num_looks < MAX_SILENT_LOOKS:
            return
        _, step_id, phase, host = words.split() if words else ("", "none", "starting", "an unknown node")
        silent_s = time.monotonic() - heard.since_s
        self.failure = (
            f"rank {rank} on {host} has been silent for {silent_s:.1f} s; its last step was {step_id} (phase {phase})"
        )


@dataclass(slots=True)
class _Heard:
    """A rank's last words, how often they have been found unchanged, and since when."""

    words: str = ""
    num_looks: int = 0
    since_s: float = field(default_factory=time.monotonic)


def _key(rank: int) -> str:
    return f"beat-{rank}"
