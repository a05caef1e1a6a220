"""Which replica's cache holds which blocks: the router's index, exact as long as no event is missed.

A block's hash names its whole prefix, so a replica's longest match is found by walking the hashes of a prompt in order. Entries
come from a replica's numbered events; a hole in the numbers means that events were lost, and what was known stays in use,
marked, until a snapshot is loaded. A routed prompt is entered at once as speculative, so that a burst with one prefix meets in
one place; such an entry becomes real with the replica's own event, or lapses.

Life cycle of a replica: `add_replica` -> `apply` ... (gap -> `load_snapshot`) ... -> `remove_replica`. An engine that restarts
is removed and added again: it counts its events from 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..common.requests import BlockStored, KvEvent

_CONFIRMED = -1
_MAX_MISSED_MESSAGES = 4096


@dataclass(slots=True)
class _ReplicaIndex:
    """`blocks` maps a hash to the tick at which a speculative entry lapses, or _CONFIRMED."""

    blocks: dict[bytes, int] = field(default_factory=dict)
    next_event_id: int = 1
    needs_snapshot: bool = False
    num_snapshots: int = 0
    missed: deque[tuple[int, Sequence[KvEvent]]] = field(default_factory=lambda: deque(maxlen=_MAX_MISSED_MESSAGES))


class ReplicaTrie:
    """See the module. Ticks are the caller's, never decrease; speculative entries last `speculative_ticks`."""

    def __init__(self, *, speculative_ticks: int) -> None:
        self._speculative_ticks = speculative_ticks
        self._replicas: dict[str, _ReplicaIndex] = {}
        self._lapses: deque[tuple[int, str, Sequence[bytes]]] = deque()

    def add_replica(self, replica: str) -> None:
        """A replica with an empty cache whose next event has id 1."""
        self._replicas[replica] = _ReplicaIndex()

    def remove_replica(self, replica: str) -> None:
        del self._replicas[replica]

    def num_blocks(self, replica: str) -> int:
        return len(self._replicas[replica].blocks)

    def confirmed_blocks(self, replica: str) -> set[bytes]:
        """The blocks that the replica itself has named: all of its cache, while no snapshot is needed."""
        return {block for block, lapse in self._replicas[replica].blocks.items() if lapse == _CONFIRMED}

    def is_confirmed(self, replica: str, block_hash: bytes) -> bool:
        """Whether the replica itself has named it."""
        return self._replicas[replica].blocks.get(block_hash) == _CONFIRMED

    def num_snapshots(self, replica: str) -> int:
        """Loaded since it was added."""
        return self._replicas[replica].num_snapshots

    def needs_snapshot(self, replica: str) -> bool:
        return self._replicas[replica].needs_snapshot

    def apply(self, replica: str, *, first_event_id: int, events: Sequence[KvEvent]) -> bool:
        """Take a replica's events; seen ones are skipped. False: some are missing and a snapshot is needed."""
        index = self._replicas[replica]
        num_seen = index.next_event_id - first_event_id
        if index.needs_snapshot or num_seen < 0:
            index.needs_snapshot = True
            index.missed.append((first_event_id, events))
            return False
        for event in events[num_seen:]:
            if isinstance(event, BlockStored):
                index.blocks[event.block_hash] = _CONFIRMED
            else:
                index.blocks.pop(event.block_hash, None)
        index.next_event_id = max(index.next_event_id, first_event_id + len(events))
        return True

    def load_snapshot(self, replica: str, *, blocks: Iterable[BlockStored], next_event_id: int) -> bool:
        """Replace what is known of a replica, then take the events that came while the snapshot was on its way.

        False: some events after the snapshot are missing still, and another one is needed.
        """
        index = self._replicas[replica]
        index.blocks = {block: lapse for block, lapse in index.blocks.items() if lapse != _CONFIRMED}
        index.blocks.update((block.block_hash, _CONFIRMED) for block in blocks)
        index.next_event_id = next_event_id
        index.needs_snapshot = False
        index.num_snapshots += 1
        missed = list(index.missed)
        index.missed.clear()
        for first_event_id, events in missed:
            self.apply(replica, first_event_id=first_event_id, events=events)
        return not index.needs_snapshot

    def insert_speculative(self, replica: str, hashes: Sequence[bytes], *, tick: int) -> None:
        """Blocks that the replica will hold soon."""
        self._drop_lapsed(tick)
        blocks = self._replicas[replica].blocks
        lapse = tick + self._speculative_ticks
        for block_hash in hashes:
            if blocks.get(block_hash) != _CONFIRMED:
                blocks[block_hash] = lapse
        self._lapses.append((lapse, replica, hashes))

    def match(self, hashes: Sequence[bytes], replicas: Iterable[str], *, tick: int) -> list[int]:
        """For each of `replicas`, how many leading blocks of `hashes` it holds."""
        self._drop_lapsed(tick)
        return [_num_leading(self._replicas[replica].blocks, hashes) for replica in replicas]

    def _drop_lapsed(self, tick: int) -> None:
        while self._lapses and self._lapses[0][0] <= tick:
            lapse, replica, hashes = self._lapses.popleft()
            blocks = self._replicas[replica].blocks if replica in self._replicas else {}
            for block_hash in hashes:
                if blocks.get(block_hash) == lapse:  # else confirmed, or entered again later
                    del blocks[block_hash]


def _num_leading(blocks: Mapping[bytes, int], hashes: Sequence[bytes]) -> int:
    """By halving: a cache that holds a block holds all before it, since it evicts from the end."""
    if not hashes or hashes[0] not in blocks:
        return 0
    held, beyond = 0, len(hashes)
    while beyond - held > 1:
        middle = (held + beyond) // 2
        if hashes[middle] in blocks:
            held = middle
        else:
            beyond = middle
    return beyond
