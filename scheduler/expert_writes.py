"""How a sparse layer's slots get from one placement to another while it serves: a few writes a step, no expert ever missing.

Between any two steps every expert has a slot, so the router always has where to send its tokens. A layer that gets there with
the fewest writes possible needs one for each slot that changes, and these do, but where a long cycle of experts without copies
does not fit into one step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .step_plan import SlotWrite

MIN_LIMIT = 2  # of an exchange between two slots of one rank


def next_writes(now: Sequence[int], target: Sequence[int], *, slots_per_rank: int, limit: int) -> tuple[SlotWrite, ...]:
    """The writes of one step on the way from `now` to `target`, both [slots] logical experts; () where they are equal.

    A rank reads at most `limit` of its slots and writes at most as many. Repeated, it arrives: each step settles one or more.

    Raises:
        ValueError: `limit` is below MIN_LIMIT, or an expert of `now` is not in `target`.
    """
    if limit < MIN_LIMIT:
        raise ValueError(f"limit is at least {MIN_LIMIT}, not {limit}")
    if lost := set(now) - set(target):
        raise ValueError(f"experts {sorted(lost)} have no slot in the target")
    step = _Step(now, target, slots_per_rank, limit)
    while sum(step.take_copy(slot) for slot in step.open_slots()):
        pass  # what was written may be the second copy that another slot has waited for
    if not step.writes:
        for slot in step.open_slots():
            step.take_cycle(slot)
    return tuple(step.writes)


def after_writes(now: Sequence[int], writes: Sequence[SlotWrite]) -> list[int]:
    """[slots] logical experts behind the step."""
    after = list(now)
    for write in writes:
        after[write.slot] = now[write.source]
    return after


class _Step:
    """The writes of one step as they are chosen. Sources are read before all of them, so any slot of `now` may be one."""

    def __init__(self, now: Sequence[int], target: Sequence[int], slots_per_rank: int, limit: int) -> None:
        self.writes: list[SlotWrite] = []
        self._now, self._target, self._slots_per_rank, self._limit = now, target, slots_per_rank, limit
        self._written: set[int] = set()
        self._num_copies = Counter(now)
        self._num_read: Counter[int] = Counter()  # by rank
        self._num_written: Counter[int] = Counter()
        self._slots_of: dict[int, list[int]] = {}
        for slot, expert in enumerate(now):
            self._slots_of.setdefault(expert, []).append(slot)

    def open_slots(self) -> list[int]:
        """Slots that have to change and are not written yet."""
        slots = range(len(self._now))
        return [slot for slot in slots if self._now[slot] != self._target[slot] and slot not in self._written]

    def take_copy(self, slot: int) -> bool:
        """Writes the slot what it is to have, if what it has is elsewhere too."""
        if self._num_copies[self._now[slot]] < 2:
            return False
        rank = slot // self._slots_per_rank
        sources = self._slots_of[self._target[slot]]
        source = min(sources, key=lambda other: (self._rank(other) != rank, self._num_read[self._rank(other)], other))
        return self._take([SlotWrite(slot, source)])

    def take_cycle(self, slot: int) -> bool:
        """Passes on the experts of slots that wait for each other; where there are too many, sets this slot right alone."""
        cycle = [slot]
        while (source := self._only_slot_of(self._target[cycle[-1]])) != slot:
            if source in self._written:
                return False
            cycle.append(source)
        sources = cycle[1:] + cycle[:1]
        return self._take(list(map(SlotWrite, cycle, sources))) or self._take(
            [SlotWrite(slot, sources[0]), SlotWrite(sources[0], slot)]
        )

    def _only_slot_of(self, expert: int) -> int:
        # No open slot's expert has a second copy, so none is one too many: each has as many slots as it will have.
        (slot,) = [other for other in self._slots_of[expert] if self._target[other] != expert]
        return slot

    def _take(self, writes: list[SlotWrite]) -> bool:
        """All of them if no rank has too much to do then, else none."""
        num_read = self._num_read + Counter(self._rank(write.source) for write in writes)
        num_written = self._num_written + Counter(self._rank(write.slot) for write in writes)
        if max(*num_read.values(), *num_written.values()) > self._limit:
            return False
        self._num_read, self._num_written = num_read, num_written
        for slot, source in writes:
            self._num_copies[self._now[slot]] -= 1
            self._num_copies[self._now[source]] += 1
        self.writes += writes
        self._written.update(write.slot for write in writes)
        return True

    def _rank(self, slot: int) -> int:
        return slot // self._slots_per_rank
