"""The two lines of sequences, waiting and running, each in the order of their keys, and the slots of those that run."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from operator import attrgetter

from .sequence import NO_SLOT, SequenceState

_key = attrgetter("key")


class SequenceLines:
    """Lists kept sorted by `SequenceState.key`. A released slot can be taken again at once: plans are applied in order."""

    def __init__(self, num_slots: int) -> None:
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots))  # a heap: low rows first keep the runner's batch dense
        self._released_slots: list[int] = []

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def wait(self, sequence: SequenceState) -> None:
        insort(self.waiting, sequence, key=_key)

    def run(self, sequence: SequenceState) -> None:
        """From waiting to running, with the lowest free slot."""
        _remove(self.waiting, sequence)
        sequence.slot = heapq.heappop(self._free_slots)
        insort(self.running, sequence, key=_key)

    def take_out(self, sequence: SequenceState) -> None:
        """Out of its line; a running one gives its slot back."""
        if sequence.slot == NO_SLOT:
            _remove(self.waiting, sequence)
            return
        _remove(self.running, sequence)
        heapq.heappush(self._free_slots, sequence.slot)
        self._released_slots.append(sequence.slot)
        sequence.slot = NO_SLOT

    def drain_released_slots(self) -> tuple[int, ...]:
        released = tuple(self._released_slots)
        self._released_slots.clear()
        return released

    def check_invariants(self) -> None:
        for line in (self.waiting, self.running):
            keys = [sequence.key for sequence in line]
            assert keys == sorted(set(keys)), "a line is out of order"
        slots = sorted([*self._free_slots, *(sequence.slot for sequence in self.running)])
        assert slots == list(range(self._num_slots)), "a slot is lost or taken twice"
        assert all(sequence.slot == NO_SLOT and not sequence.block_ids for sequence in self.waiting)


def _remove(line: list[SequenceState], sequence: SequenceState) -> None:
    index = bisect_left(line, sequence.key, key=_key)
    assert line[index] is sequence
    del line[index]
