"""The KV blocks of sequences: taken at admission, grown with each step, made matchable when computed, given back at the end.

Blocks that a step in flight may still read or write are given back only when that step is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..common.hashing import block_hashes
from .block_manager import BlockManager
from .block_trie import BlockTrie, PrefixMatch
from .sequence import SequenceState
from .step_plan import BlockReplacement

_NO_MATCH = PrefixMatch((), (), 0)


class SequenceCache:
    """See the module; `prefix_caching=False` leaves the trie empty."""

    def __init__(self, num_blocks: int, *, block_size: int, prefix_caching: bool) -> None:
        self.manager = BlockManager(num_blocks)
        self.trie = BlockTrie(self.manager, block_size=block_size)
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._tick = 0
        self._done_step_id = 0
        self._leaving: dict[int, list[list[int]]] = {}  # step id -> blocks given back when it is done
        self._replaced: list[tuple[SequenceState, int]] = []

    @property
    def num_available(self) -> int:
        """Blocks that can be had now, evicting what is cached."""
        return self.manager.num_free + self.manager.num_cached

    @property
    def is_waiting_for_step(self) -> bool:
        """Whether a step in flight brings blocks back."""
        return bool(self._leaving)

    def begin_step(self, step_id: int) -> None:
        """A plan is being made: its id is the tick of what happens from now on."""
        self._tick = step_id

    def step_done(self, step_id: int) -> None:
        """A step is over: give back what waited for it."""
        self._done_step_id = step_id
        for blocks in self._leaving.pop(step_id, ()):
            self.trie.release(blocks, tick=self._tick)

    def is_in_flight(self, sequence: SequenceState) -> bool:
        return sequence.last_step_id > self._done_step_id

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, sequence: SequenceState) -> PrefixMatch:
        """A tentative prefix hit, to be given to `enter` or `rollback`."""
        if not self._prefix_caching:
            return _NO_MATCH
        self._extend_hashes(sequence, len(sequence.tokens) // self.block_size)
        return self.trie.match(sequence.tokens, hashes=sequence.hashes, root=sequence.root)

    def is_being_extended(self, sequence: SequenceState, match: PrefixMatch, running: Sequence[SequenceState]) -> bool:
        """Whether a running prefill is computing the larger part of what this sequence lacks: waiting saves doing it twice."""
        size = self.block_size
        half = self.num_blocks_for((len(sequence.tokens) - match.num_tokens + 1) // 2)
        index = len(match.nodes) + half - 1  # the hash of this block names all that is before it
        if not self._prefix_caching or index >= (len(sequence.tokens) - 1) // size:
            return False
        wanted = sequence.hashes[index]
        return any(index < len(s.hashes) and s.hashes[index] == wanted and s.is_matchable for s in running)

    def rollback(self, match: PrefixMatch) -> None:
        self.trie.rollback(match)

    def enter(self, sequence: SequenceState, match: PrefixMatch) -> None:
        """The sequence starts with the blocks of its match."""
        sequence.block_ids = list(match.block_ids)
        sequence.num_computed = match.num_tokens
        sequence.num_committed = len(match.nodes)
        sequence.node = match.nodes[-1] if match.nodes else None
        sequence.is_matchable = self._prefix_caching
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(match.num_tokens, sequence.num_prompt)

    def grow(self, sequence: SequenceState, num_tokens: int) -> tuple[int, ...] | None:
        """Blocks for `num_tokens` more computed tokens, appended to the sequence's; None, and nothing changed, without room."""
        missing = self.num_blocks_for(sequence.num_computed + num_tokens) - len(sequence.block_ids)
        if missing <= 0:
            return ()
        blocks = self.trie.allocate(missing)
        if blocks is None:
            return None
        sequence.block_ids += blocks
        return tuple(blocks)

    def commit(self, sequence: SequenceState, num_computed: int) -> None:
        """Make the full blocks of the first `num_computed` tokens matchable; those of identical siblings are merged."""
        size = self.block_size
        num_full = num_computed // size
        if not sequence.is_matchable or num_full <= sequence.num_committed:
            return
        self._extend_hashes(sequence, num_full)
        for index in range(sequence.num_committed, num_full):
            own = sequence.block_ids[index]
            node = self.trie.insert(
                sequence.tokens[index * size : (index + 1) * size],
                parent=sequence.node,
                parent_hash=sequence.hashes[index - 1] if index else sequence.root,
                block_hash=sequence.hashes[index],
                block_id=own,
            )
            if node is None:
                sequence.is_matchable = False
                return
            if node.block_id != own:
                sequence.block_ids[index] = node.block_id
                self._replaced.append((sequence, index))
                self._give_back([own], sequence)
            sequence.node = node
            sequence.num_committed = index + 1

    def leave(self, sequence: SequenceState) -> None:
        """The sequence gives all its blocks back; its full ones stay cached."""
        self._give_back(sequence.block_ids, sequence)
        self._replaced = [entry for entry in self._replaced if entry[0] is not sequence]
        sequence.block_ids = []
        sequence.node = None
        sequence.num_committed = sequence.num_computed = 0

    def drain_replaced(self) -> tuple[BlockReplacement, ...]:
        """Merged blocks that the runner does not know of yet."""
        if not self._replaced:
            return ()
        replaced = tuple(BlockReplacement(s.slot, index, s.block_ids[index]) for s, index in self._replaced)
        self._replaced.clear()
        return replaced

    def check_invariants(self, running: Sequence[SequenceState]) -> None:
        """References are exactly those of running sequences and of steps in flight; committed blocks are their nodes'."""
        self.manager.check_invariants([*(s.block_ids for s in running), *self._waiting_blocks()])
        self.trie.check_invariants()
        for sequence in running:
            node, index = sequence.node, sequence.num_committed
            while node is not None:
                index -= 1
                assert node.block_id == sequence.block_ids[index]
                assert node.block_hash == sequence.hashes[index]
                node = node.parent
            assert index == 0

    def _waiting_blocks(self) -> Iterator[list[int]]:
        for lists in self._leaving.values():
            yield from lists

    def _give_back(self, blocks: list[int], sequence: SequenceState) -> None:
        if self.is_in_flight(sequence):
            self._leaving.setdefault(sequence.last_step_id, []).append(blocks)
        else:
            self.trie.release(blocks, tick=self._tick)

    def _extend_hashes(self, sequence: SequenceState, num_blocks: int) -> None:
        known = len(sequence.hashes)
        if num_blocks > known:
            size = self.block_size
            parent = sequence.hashes[-1] if known else sequence.root
            sequence.hashes += block_hashes(sequence.tokens[known * size : num_blocks * size], size, parent=parent)
