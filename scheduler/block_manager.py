"""Which KV blocks are free, cached or used, and how many sequences hold each of them.

Life cycle of a block:  free --allocate--> used --release--> free
                                            |  ^
                       keep, then release   v  | share
                                          cached --drop--> free

A block is *used* while a sequence holds a reference, *cached* when nobody does but the prefix cache keeps it, else *free*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


class BlockManager:
    """Reference counts of blocks 1..num_blocks; page 0 of the cache is padding and never handed out."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks, 0, -1))  # a stack: the block freed last is the warmest
        self._references = [0] * (num_blocks + 1)
        self._kept = bytearray(num_blocks + 1)
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return self._num_cached

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - self._num_cached

    def num_references(self, block_id: int) -> int:
        return self._references[block_id]

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Free blocks with one reference each, or None, and nothing changed, if there are too few."""
        if num_blocks > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block_id in blocks:
            self._references[block_id] = 1
        return blocks

    def share(self, block_ids: Iterable[int]) -> None:
        """One more reference to each block; they must be used or cached."""
        references = self._references
        for block_id in block_ids:
            if not references[block_id]:
                assert self._kept[block_id], f"block {block_id} is free and cannot be shared"
                self._num_cached -= 1
            references[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """One reference less to each block; one that nobody holds becomes cached if it is kept, else free."""
        references = self._references
        for block_id in block_ids:
            assert references[block_id] > 0, f"block {block_id} is released more often than it was taken"
            references[block_id] -= 1
            if references[block_id]:
                continue
            if self._kept[block_id]:
                self._num_cached += 1
            else:
                self._free.append(block_id)

    def keep(self, block_id: int) -> None:
        """The prefix cache keeps this used block when its last reference goes."""
        assert self._references[block_id] > 0, f"block {block_id} is not used and cannot be kept"
        assert not self._kept[block_id], f"block {block_id} is kept already"
        self._kept[block_id] = 1

    def drop(self, block_id: int) -> None:
        """The prefix cache gives up this cached block: it becomes free."""
        assert self._kept[block_id], f"block {block_id} is not in the prefix cache"
        assert not self._references[block_id], f"block {block_id} is used and cannot be evicted"
        self._kept[block_id] = 0
        self._num_cached -= 1
        self._free.append(block_id)

    def check_invariants(self, holders: Sequence[Sequence[int]] | None = None) -> None:
        """free + cached + used = total, no block in two states, and, given every holder's blocks, references = holders."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block_id in range(1, self.num_blocks + 1):
            is_free = not self._references[block_id] and not self._kept[block_id]
            assert (block_id in free) == is_free, f"block {block_id} is listed free: {block_id in free}, is free: {is_free}"
        cached = sum(1 for b in range(1, self.num_blocks + 1) if self._kept[b] and not self._references[b])
        assert cached == self._num_cached, f"{cached} blocks are cached, {self._num_cached} are counted"
        assert self.num_free + self.num_cached + self.num_used == self.num_blocks
        if holders is not None:
            held = _count(holders)
            for block_id in range(1, self.num_blocks + 1):
                expected, found = held.get(block_id, 0), self._references[block_id]
                assert found == expected, f"block {block_id} has {found} references and {expected} holders"


def _count(holders: Sequence[Sequence[int]]) -> Mapping[int, int]:
    counts: dict[int, int] = {}
    for blocks in holders:
        for block_id in blocks:
            counts[block_id] = counts.get(block_id, 0) + 1
    return counts
