"""Copies of weighted items in packs of equal size, evenly loaded, never two copies of an item in one pack.

The packs of EPLB: ranks with their physical slots, or nodes with their expert groups. After 'balanced packing' of DeepSeek's
EPLB (2025): heaviest first, each to the lightest pack that has room (LPT: Graham 1969, with a limit on the number of items).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

FREE = -1


class Packs:
    """`num_packs` packs of `num_slots` slots each. Ties go to the pack with fewer items, then to the lower number.

    Attributes:
        slots: [packs][slots] item numbers or FREE.
        loads: [packs] sums of the weights in them.
    """

    def __init__(self, num_packs: int, num_slots: int, weights: Sequence[float]) -> None:
        """`weights`: [items], of one copy."""
        self.slots = [[FREE] * num_slots for _ in range(num_packs)]
        self.loads = [0.0] * num_packs
        self._weights = weights
        self._num_slots = num_slots
        self._items: list[set[int]] = [set() for _ in range(num_packs)]
        self._num_copies = [0] * len(weights)

    @property
    def max_load(self) -> float:
        return max(self.loads)

    def put(self, item: int, pack: int, slot: int) -> None:
        assert self.slots[pack][slot] == FREE
        assert item not in self._items[pack]
        self.slots[pack][slot] = item
        self._items[pack].add(item)
        self._num_copies[item] += 1
        self.loads[pack] += self._weights[item]

    def take(self, pack: int, slot: int) -> int:
        item = self.slots[pack][slot]
        self.slots[pack][slot] = FREE
        self._items[pack].remove(item)
        self._num_copies[item] -= 1
        self.loads[pack] -= self._weights[item]
        return item

    def keep(self, old_slots: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        """Puts items where they were in `old_slots` [packs][slots], up to `counts` [items] copies; heavy packs lose first."""
        places: dict[int, list[tuple[int, int]]] = {}
        for pack, old in enumerate(old_slots):
            for slot, item in enumerate(old):
                if counts[item]:
                    places.setdefault(item, []).append((pack, slot))
        old_loads = [sum(self._weights[item] for item in old if counts[item]) for old in old_slots]
        for item, where in places.items():
            where.sort(key=lambda place: (old_loads[place[0]], place))
            for pack, slot in where[: counts[item]]:
                if item not in self._items[pack]:
                    self.put(item, pack, slot)

    def fill(self, counts: Sequence[int]) -> None:
        """Adds what is missing to `counts` [items] copies, the heaviest first. O(n log n) for n copies.

        All slots must be filled by them, and no item may have more copies than there are packs.
        """
        heap = [self._order(pack) for pack in range(len(self.slots)) if self._has_room(pack)]
        heapq.heapify(heap)
        for item in sorted(range(len(counts)), key=lambda item: (-self._weights[item], item)):
            aside: list[int] = []  # packs with room that have the item, or get it now
            while self._num_copies[item] < counts[item]:
                if heap:
                    pack = heapq.heappop(heap)[2]
                    aside.append(pack)
                    if item not in self._items[pack]:
                        self.put(item, pack, self.slots[pack].index(FREE))
                else:
                    self._make_room(item, min((pack for pack in aside if self._has_room(pack)), key=self._order))
            for pack in aside:
                if self._has_room(pack):
                    heapq.heappush(heap, self._order(pack))

    def balance(self, max_load: float) -> None:
        """Swaps items of the heaviest pack until none is above `max_load`, or no swap helps. All packs are full."""
        for _ in range(len(self.slots) * self._num_slots):
            order = sorted(range(len(self.slots)), key=self._order)
            heaviest = order.pop()
            if self.loads[heaviest] <= max_load:
                return
            for pack in order:
                if (swap := self._find_swap(heaviest, pack)) is not None:
                    self._swap(heaviest, swap[0], pack, swap[1])
                    break
            else:
                return

    def _order(self, pack: int) -> tuple[float, int, int]:
        return self.loads[pack], len(self._items[pack]), pack

    def _has_room(self, pack: int) -> bool:
        return len(self._items[pack]) < self._num_slots

    def _make_room(self, item: int, roomy: int) -> None:
        """Puts the item into a full pack whose own item moves to the `roomy` one, which has the item already.

        There is always one: some pack has no copy, and it has more items than the roomy one, so one that is not there.
        """
        best: tuple[float, int, int] | None = None
        for pack, slots in enumerate(self.slots):
            if item in self._items[pack]:
                continue
            for slot, other in enumerate(slots):
                if other not in self._items[roomy]:
                    weight = self._weights[other]
                    load = max(self.loads[roomy] + weight, self.loads[pack] - weight + self._weights[item])
                    best = min(best or (load, pack, slot), (load, pack, slot))
        assert best is not None
        _, pack, slot = best
        self.put(self.take(pack, slot), roomy, self.slots[roomy].index(FREE))
        self.put(item, pack, slot)

    def _find_swap(self, heavy: int, light: int) -> tuple[int, int] | None:
        """The slots of both packs whose swap makes them most even; None if none makes the heavy one lighter."""
        gap = self.loads[heavy] - self.loads[light]
        best: tuple[float, int, int] | None = None
        candidates = [
            (slot, self._weights[item]) for slot, item in enumerate(self.slots[light]) if item not in self._items[heavy]
        ]
        for slot, item in enumerate(self.slots[heavy]):
            if item in self._items[light]:
                continue
            for other_slot, other_weight in candidates:
                moved = self._weights[item] - other_weight
                if gap * 1e-9 < moved < gap * (1 - 1e-9):
                    choice = (abs(moved - gap / 2), slot, other_slot)
                    if best is None or choice < best:
                        best = choice
        return best[1:] if best is not None else None

    def _swap(self, pack: int, slot: int, other: int, other_slot: int) -> None:
        item, other_item = self.take(pack, slot), self.take(other, other_slot)
        self.put(other_item, pack, slot)
        self.put(item, other, other_slot)
