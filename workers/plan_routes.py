"""How step plans get from the leader to each rank: through shared memory on its own machine, over gRPC to others.

Every rank says what machine it is on, the leader decides, and tells each rank where its plans will come from.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Protocol

from ..common.errors import InternalError
from .comm import RankGroup
from .plan_channel import Reader, Writer
from .plan_stream import PlanFollower, PlanServer

_SHARED_MEMORY = Path("/dev/shm")


class PlanReceiver(Protocol):
    """A rank's end."""

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, None if there is none in time. Raises ChannelClosed at the leader's end."""

    def close(self) -> None: ...


class PlanSender:
    """The leader's ends. `send` hands a message to all ranks and raises what the channels raise."""

    def __init__(self, group: RankGroup) -> None:
        """Waits until every rank has opened its end. LostReader names one that has not in time."""
        place = group.place
        own, others = machine(), range(1, place.size)
        is_near = {rank: group.hear(f"machine-{rank}") == own for rank in others}
        near, far = ([rank for rank in others if is_near[rank] is wanted] for wanted in (True, False))
        self._ring: Writer | None = None
        self._stream: PlanServer | None = None
        if near:
            name = f"pilotfish-{place.epoch}-{uuid.uuid4().hex[:12]}"
            self._ring = Writer(name, epoch=place.epoch, readers=[rank_name(rank) for rank in near])
            for index, rank in enumerate(near):
                group.tell(f"plans-{rank}", f"ring {name} {index}")
        if far:
            assert place.identity is not None, "ranks of several machines have identities"
            self._stream = PlanServer(epoch=place.epoch, followers=[rank_name(rank) for rank in far], identity=place.identity)
            address = self._stream.start(host=place.host)
            for rank in far:
                group.tell(f"plans-{rank}", f"stream {address}")
        if self._ring is not None:
            self._ring.wait_for_readers(place.timeout_s)
        if self._stream is not None:
            self._stream.wait_for_followers(place.timeout_s)

    def send(self, message: bytes, timeout_s: float) -> None:
        if self._ring is not None:
            self._ring.send(message, timeout_s)
        if self._stream is not None:
            self._stream.send(message, timeout_s)

    def close(self) -> None:
        for end in (self._ring, self._stream):
            if end is not None:
                end.close()


def open_receiver(group: RankGroup) -> PlanReceiver:
    """The end of a rank that is not the leader, as the leader says."""
    place = group.place
    group.tell(f"machine-{place.rank}", machine())
    kind, *where = group.hear(f"plans-{place.rank}").split()
    if kind == "ring":
        return Reader(where[0], epoch=place.epoch, index=int(where[1]), timeout_s=place.timeout_s)
    if kind == "stream":
        assert place.identity is not None, "ranks of several machines have identities"
        return PlanFollower(
            where[0],
            epoch=place.epoch,
            follower=rank_name(place.rank),
            leader=place.leader_name,
            identity=place.identity,
            timeout_s=place.timeout_s,
        )
    raise InternalError(f"rank {place.rank} is told to read step plans from {kind!r}, which this version does not know")


def rank_name(rank: int) -> str:
    return f"rank {rank}"


def machine() -> str:
    """Equal in two processes exactly where they can share memory: one kernel, one /dev/shm."""
    shared = os.stat(_SHARED_MEMORY)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}.{shared.st_dev}.{shared.st_ino}"
