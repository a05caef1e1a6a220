"""Large sums of two ranks that take no multiprocessor from the products beside them: copy engines move the addends.

A sum that is started into slot s of each rank's memory is, on a stream beside:

    meet    both ranks have come here: nobody reads slot s any more
    copy    of this rank's addend into slot s of the other rank
    meet    both copies are there

Who waits for it lets its own stream wait for the second meeting, and adds what came to its own on the way through the norm
(kernels/rms_norm.py). Of two addends both ranks compute the same bits, whoever is first.

Why no copy overwrites what is still read: a slot is used again only when the sum before in it has been waited for, and whoever
reads what came queues that before it starts another sum. The stream beside waits for what was queued until the start, so behind
the first meeting it has been read on both ranks. Slots serve by turns, two of them, since in halves (models/layers/stack.py)
two sums are under way at most. A CUDA graph keeps the slots it was captured with; it starts sums and waits for all of them, so
between graphs every slot is free. What counts the meetings is on the device (kernels/peer_buffers.py), and so are their limits:
where a rank does not come, or the host ends the wait, all go on and the step is void.

Memory on each rank: NUM_SLOTS times the largest addend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..common.errors import InternalError
from ..common.rank_place import RankPlace
from ..kernels.cuda import driver
from ..kernels.cuda.shareable_memory import bytes_at
from ..kernels.meet import meet
from ..kernels.peer_buffers import receive_bytes
from ..models.parallel import StartedSum
from .peer_collectives import PeerCollectives
from .peer_memory import Words, open_peer_buffers

NUM_RANKS = 2
NUM_SLOTS = 2
_MEETING_BYTES = 4096  # more than a meeting needs: slots begin at a whole page behind it
_ALIGNED = 256  # bytes, where each slot begins
_URGENT = -1


def open_pushed_sums(
    place: RankPlace, words: Words, device: torch.device, *, name: str, agree_on_least: Callable[[int], int], max_bytes: int
) -> PushedSums | None:
    """For addends of up to `max_bytes`; None, on both ranks, where one of them cannot. As open_peer_buffers."""
    slot_bytes = -(-max_bytes // _ALIGNED) * _ALIGNED
    buffers = open_peer_buffers(
        place,
        words,
        device,
        name=name,
        agree_on_least=agree_on_least,
        capacity_bytes=_MEETING_BYTES,
        room_bytes=NUM_SLOTS * slot_bytes,
    )
    if buffers is None:
        return None
    own, other = (buffers.addresses[rank] + receive_bytes(NUM_RANKS, _MEETING_BYTES) for rank in (place.rank, 1 - place.rank))
    received_SB = bytes_at(own, NUM_SLOTS * slot_bytes).view(NUM_SLOTS, slot_bytes)
    return PushedSums(PeerCollectives(buffers), received_SB, [other + slot * slot_bytes for slot in range(NUM_SLOTS)])


class PushedSums:
    """As one of the two ranks of `peers` starts them.

    Args:
        peers: whose buffers nothing else uses.
        received_SB: uint8 [NUM_SLOTS, B] on this GPU, which the other rank copies into.
        targets: the addresses of the other rank's slots, as mapped here.
    """

    def __init__(self, peers: PeerCollectives, received_SB: torch.Tensor, targets: Sequence[int]) -> None:
        if peers.buffers.size != NUM_RANKS or len(received_SB) != NUM_SLOTS or len(targets) != NUM_SLOTS:
            raise ValueError(f"sums by copies are of {NUM_RANKS} ranks and need {NUM_SLOTS} slots on each")
        self.peers = peers
        self._received_SB = received_SB
        self._targets = targets
        self._under_way = [False] * NUM_SLOTS
        self._next_slot = 0
        # A meeting is short: it goes before whatever waits for a multiprocessor.
        self._stream = torch.cuda.Stream(received_SB.device, priority=_URGENT)

    @property
    def max_bytes(self) -> int:
        """Of an addend."""
        return self._received_SB.shape[1]

    def start(self, x: torch.Tensor) -> StartedSum | None:
        """Begins the sum of both ranks' x, contiguous. None where it is too large, which follows from its shape and dtype.

        Raises:
            InternalError: NUM_SLOTS sums are under way.
        """
        if x.nbytes > self.max_bytes:
            return None
        slot = self._next_slot
        if self._under_way[slot]:
            raise InternalError(f"{NUM_SLOTS} sums over ranks are under way: wait for the first before another is started")
        self._under_way[slot] = True
        self._next_slot = (slot + 1) % NUM_SLOTS
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            meet(self.peers.buffers)
            driver.copy(self._targets[slot], x.data_ptr(), x.nbytes, self._stream.cuda_stream)
            meet(self.peers.buffers)
        other = self._received_SB[slot, : x.nbytes].view(x.dtype).view(x.shape)
        return StartedSum(x, partial(self._finish, slot, self._stream.record_event()), other)

    def _finish(self, slot: int, arrived: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(arrived)
        self._under_way[slot] = False
