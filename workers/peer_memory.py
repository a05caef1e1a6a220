"""The buffers through which the ranks of one machine exchange small messages: GPU memory that each maps of all others.

Life cycle: once a group stands, all its ranks call `open_peer_buffers`, which ends with the same answer on every rank: buffers,
or None where one rank cannot (several machines, no peer access, another GPU, no compiler); the reason is logged once
and NCCL serves instead. What was mapped stays so until the process ends; a peer's death does not take its memory away before.

Descriptors of the memory go through Unix sockets in a folder of this user's alone; their paths are left in the group's store.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from ..common.rank_place import RankPlace
from ..kernels.all_reduce import is_available
from ..kernels.cuda.driver import CudaError
from ..kernels.cuda.shareable_memory import allocate, fill, map_shared
from ..kernels.dispatch import kernel_mode
from ..kernels.peer_buffers import MAX_RANKS, NOTHING, PeerBuffers, receive_bytes

logger = logging.getLogger(__name__)

# The largest message.
CAPACITY_BYTES = 4 << 20
_MACHINE_ID = Path("/proc/sys/kernel/random/boot_id")
_EXCHANGE_S = 10.0


class Words(Protocol):
    """What ranks leave for each other (comm.RankStore)."""

    def tell(self, key: str, value: str) -> None: ...

    def hear(self, key: str) -> str: ...


def open_peer_buffers(
    place: RankPlace,
    words: Words,
    device: torch.device,
    *,
    name: str,
    agree_on_least: Callable[[int], int],
    capacity_bytes: int = CAPACITY_BYTES,
    room_bytes: int = 0,
) -> PeerBuffers | None:
    """Buffers for messages of up to `capacity_bytes`; None, on all ranks, where one of them cannot. Once in a group's life.

    Args:
        room_bytes: more memory that all map, behind each rank's buffer, for whatever else.
        place: among the ranks of the group, whose `name` no other group has.
        agree_on_least: a collective of these ranks, or of more that open buffers at this moment.

    Raises what `words` and `agree_on_least` raise where a rank does not come in time.
    """
    reason = _unfit_reason(place, words, device, name=name)
    if not agree_on_least(reason is None):
        _say_why_not(place, reason)
        return None
    addresses: tuple[int, ...] = ()
    state = torch.zeros(4, dtype=torch.int32, device=device)
    try:
        addresses = _map_all(place, words, receive_bytes(place.size, capacity_bytes) + room_bytes, device.index, name=name)
    except (CudaError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
    # Nobody writes into a buffer before all have been filled, nor counts before there is a zero.
    if not agree_on_least(reason is None):
        _say_why_not(place, reason)
        return None
    return PeerBuffers(
        rank=place.rank,
        addresses=addresses,
        capacity_bytes=capacity_bytes,
        state=state,
        failed=torch.zeros(1, dtype=torch.int32, pin_memory=True),
        timeout_s=place.timeout_s,
    )


def _say_why_not(place: RankPlace, reason: str | None) -> None:
    if reason is not None:
        logger.warning("rank %d has no memory in common with its peers, NCCL serves in its place: %s", place.rank, reason)


def _unfit_reason(place: RankPlace, words: Words, device: torch.device, *, name: str) -> str | None:
    words.tell(f"{name}-machine-{place.rank}", _MACHINE_ID.read_text().strip())
    machines = {words.hear(f"{name}-machine-{rank}") for rank in range(place.size)}
    if len(machines) > 1:
        return f"the {place.size} ranks are on {len(machines)} machines"
    if place.size > MAX_RANKS:
        return f"{place.size} ranks, it serves up to {MAX_RANKS}"
    if kernel_mode() == "ref":
        return "PILOTFISH_KERNELS=ref"
    if not is_available(place.size, device):
        return f"its kernel does not run on {torch.cuda.get_device_name(device)}, or cannot be compiled"
    return None


def _map_all(place: RankPlace, words: Words, num_bytes: int, device_index: int, *, name: str) -> tuple[int, ...]:
    """The addresses of all ranks' buffers; this rank's own has been filled."""
    own = allocate(num_bytes, device_index)
    try:
        fill(own, NOTHING)
        descriptors = exchange_descriptors(place, words, own.descriptor, name=name)
    finally:
        os.close(own.descriptor)
    addresses = {rank: map_shared(descriptor, own.num_bytes, device_index) for rank, descriptor in descriptors.items()}
    addresses[place.rank] = own.address
    return tuple(addresses[rank] for rank in range(place.size))


def exchange_descriptors(place: RankPlace, words: Words, descriptor: int, *, name: str) -> dict[int, int]:
    """What the other ranks of this machine give, by rank, as descriptors of this process; each gets `descriptor`.

    Raises:
        OSError: a rank cannot be reached, or not in time. And what `words` raises where it does not say where.
    """
    others = [rank for rank in range(place.size) if rank != place.rank]
    received: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="pilotfish-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/rank"
        listener.bind(path)
        listener.listen(place.size)
        listener.settimeout(_EXCHANGE_S)
        words.tell(f"{name}-descriptors-{place.rank}", path)
        for rank in others:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_EXCHANGE_S)
                connection.connect(words.hear(f"{name}-descriptors-{rank}"))
                socket.send_fds(connection, [bytes([place.rank])], [descriptor])
        for _ in others:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_EXCHANGE_S)
                sender, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if len(sender) != 1 or len(descriptors) != 1:
                raise ConnectionError("a rank sent no descriptor")
            received[sender[0]] = descriptors[0]
    return received
