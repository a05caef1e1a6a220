"""The prefix cache: full KV blocks by the tokens they and all blocks before them hold.

A node is one full block, found by its chained hash (common/hashing.py), so that the hash names the whole prefix; every hit is
verified against the tokens themselves. Sequences hold references to whole prefixes, so a node nobody holds has no held
descendants, and every cached block can be evicted, leaves first.

Life cycle of a match: `match` takes references; then they are the sequence's until `release`, or `rollback`: nothing happened.
Life cycle of a node: `insert` when its tokens are computed -> held -> `release` -> idle, matchable -> evicted.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from ..common.requests import BlockRemoved, BlockStored, KvEvent
from .block_manager import BlockManager


class TrieNode:
    """One block in the cache. `tokens` are little-endian int32, as they are hashed."""

    __slots__ = ("block_hash", "block_id", "is_queued", "last_used", "num_children", "order", "parent", "parent_hash", "tokens")

    def __init__(self, block_hash: bytes, parent: TrieNode | None, parent_hash: bytes, tokens: bytes, block_id: int) -> None:
        self.block_hash = block_hash
        self.parent = parent
        self.parent_hash = parent_hash
        self.tokens = tokens
        self.block_id = block_id
        self.num_children = 0
        self.last_used = 0
        self.order = 0
        self.is_queued = False


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """A tentative hit: references to `block_ids` are taken, to be kept or rolled back."""

    nodes: tuple[TrieNode, ...]
    block_ids: tuple[int, ...]
    num_tokens: int


class BlockTrie:
    """See the module. Ticks are logical, never decrease, and order the eviction (LRU; the older node first among equals)."""

    def __init__(self, block_manager: BlockManager, *, block_size: int) -> None:
        self.block_size = block_size
        self._manager = block_manager
        self._nodes: dict[bytes, TrieNode] = {}  # parents before children, by insertion
        self._node_of_block: dict[int, TrieNode] = {}
        # Idle leaves by (last_used, order). A node has one entry at most; whether that is still true is seen when it is popped.
        self._idle_leaves: list[tuple[int, int, TrieNode]] = []
        self._num_inserted = 0
        self._events: list[KvEvent] = []
        self._first_event_id = 1

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, token_ids: Sequence[int], *, hashes: Sequence[bytes], root: bytes) -> PrefixMatch:
        """The longest cached prefix that leaves at least one token to compute, with references taken.

        `hashes` are those of the full blocks of `token_ids` under `root`. A node whose tokens or parent differ (a collision of
        hashes) ends the match.
        """
        width = self.block_size * 4
        data = array("i", token_ids).tobytes()
        nodes: list[TrieNode] = []
        parent_hash = root
        for index in range(min(len(hashes), (len(token_ids) - 1) // self.block_size)):
            node = self._nodes.get(hashes[index])
            if node is None or not _is(node, parent_hash, data[index * width : (index + 1) * width]):
                break
            nodes.append(node)
            parent_hash = node.block_hash
        blocks = tuple(node.block_id for node in nodes)
        self._manager.share(blocks)
        return PrefixMatch(tuple(nodes), blocks, len(blocks) * self.block_size)

    def rollback(self, match: PrefixMatch) -> None:
        """The match is not used: references go, and the order of eviction is as if it had never been."""
        self._manager.release(match.block_ids)
        self._queue_if_idle(match.nodes)

    def insert(
        self,
        token_ids: Sequence[int],
        *,
        parent: TrieNode | None,
        parent_hash: bytes,
        block_hash: bytes,
        block_id: int,
    ) -> TrieNode | None:
        """Make a computed block matchable.

        `token_ids` are the block's own. If an identical sibling is there already, the caller gets a reference to that one's
        block and must use it instead of its own (`node.block_id != block_id`). None: the hash belongs to other tokens, and the
        caller's block and all after it stay private.
        """
        tokens = array("i", token_ids).tobytes()
        node = self._nodes.get(block_hash)
        if node is not None:
            if not _is(node, parent_hash, tokens):
                return None
            self._manager.share((node.block_id,))
            return node
        node = TrieNode(block_hash, parent, parent_hash, tokens, block_id)
        node.order = self._num_inserted
        self._num_inserted += 1
        self._manager.keep(block_id)
        self._nodes[block_hash] = node
        self._node_of_block[block_id] = node
        if parent is not None:
            parent.num_children += 1
        self._events.append(BlockStored(block_hash, parent_hash))
        return node

    def release(self, block_ids: Sequence[int], *, tick: int) -> None:
        """A sequence gives its references back; blocks in the cache stay there, used last at `tick`."""
        self._manager.release(block_ids)
        nodes = [node for node in map(self._node_of_block.get, block_ids) if node is not None]
        for node in nodes:
            node.last_used = tick
        self._queue_if_idle(nodes)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Fresh blocks, evicting as many cached ones as that takes; None, and nothing changed, if there are too few."""
        missing = num_blocks - self._manager.num_free
        if missing > self._manager.num_cached:
            return None
        self.evict(missing)
        return self._manager.allocate(num_blocks)

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` cached blocks, each the least recently used leaf of its moment; returns how many."""
        evicted = 0
        while evicted < num_blocks and self._idle_leaves:
            tick, _, node = heapq.heappop(self._idle_leaves)
            node.is_queued = False
            if not self._is_idle_leaf(node):
                continue  # queued again when it becomes one
            if tick != node.last_used:
                self._queue_if_idle((node,))
                continue
            self._remove(node)
            evicted += 1
        return evicted

    def drain_events(self) -> tuple[int, tuple[KvEvent, ...]]:
        """Changes since the last call and the id of the first; ids grow by one for each event ever."""
        first_id, events = self._first_event_id, tuple(self._events)
        self._first_event_id += len(events)
        self._events.clear()
        return first_id, events

    @property
    def next_event_id(self) -> int:
        return self._first_event_id + len(self._events)

    def stored_blocks(self) -> tuple[BlockStored, ...]:
        """The whole index, parents before children."""
        return tuple(BlockStored(node.block_hash, node.parent_hash) for node in self._nodes.values())

    def check_invariants(self) -> None:
        """Links, counts and states agree, and every idle leaf waits in the eviction queue."""
        self._manager.check_invariants()
        num_children: dict[bytes, int] = {}
        seen: set[bytes] = set()
        for block_hash, node in self._nodes.items():
            assert node.block_hash == block_hash
            assert self._node_of_block[node.block_id] is node
            if node.parent is not None:
                assert node.parent.block_hash in seen
                assert self._nodes[node.parent.block_hash] is node.parent
                assert node.parent_hash == node.parent.block_hash
                held = self._manager.num_references(node.block_id)
                assert self._manager.num_references(node.parent.block_id) >= held, "a held block has a parent held less"
                num_children[node.parent_hash] = num_children.get(node.parent_hash, 0) + 1
            seen.add(block_hash)
            assert node.is_queued or not self._is_idle_leaf(node), "an idle leaf cannot be found by eviction"
        for node in self._nodes.values():
            assert node.num_children == num_children.get(node.block_hash, 0)
        assert len(self._node_of_block) == len(self._nodes)
        idle = sum(1 for node in self._nodes.values() if not self._manager.num_references(node.block_id))
        assert idle == self._manager.num_cached, f"{idle} nodes are idle, {self._manager.num_cached} blocks are cached"
        queued = [entry[2] for entry in self._idle_leaves]
        assert len({id(node) for node in queued}) == len(queued) == sum(node.is_queued for node in self._nodes.values())

    def _is_idle_leaf(self, node: TrieNode) -> bool:
        return not node.num_children and not self._manager.num_references(node.block_id)

    def _queue_if_idle(self, nodes: Sequence[TrieNode]) -> None:
        for node in nodes:
            if not node.is_queued and self._is_idle_leaf(node):
                node.is_queued = True
                heapq.heappush(self._idle_leaves, (node.last_used, node.order, node))

    def _remove(self, node: TrieNode) -> None:
        del self._nodes[node.block_hash]
        del self._node_of_block[node.block_id]
        self._manager.drop(node.block_id)
        self._events.append(BlockRemoved(node.block_hash))
        if node.parent is not None:
            node.parent.num_children -= 1
            self._queue_if_idle((node.parent,))


def _is(node: TrieNode, parent_hash: bytes, tokens: bytes) -> bool:
    return node.parent_hash == parent_hash and node.tokens == tokens
