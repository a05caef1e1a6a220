"""Where a worker stands among those that compute one replica together."""

from __future__ import annotations

from dataclasses import dataclass

from .identity import Identity

LEADER = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """Rank `rank` of `size` under `epoch`.

    Attributes:
        address: "host:port" where the ranks find each other; the leader has opened it.
        host: this rank's own address, on which the others reach it.
        timeout_s: of every collective, and of the wait for all ranks to come.
        whole_experts: ranks share the experts of sparse layers instead of each expert's intermediate size.
        gpu: which of the GPUs that this rank's process sees it takes, where it takes one.
        identity: this rank's, and `leader_name` the name in the leader's: ranks on other machines than the leader's need them.
    """

    rank: int
    size: int
    epoch: int
    address: str
    host: str
    timeout_s: float
    whole_experts: bool = False
    gpu: int = 0
    identity: Identity | None = None
    leader_name: str = ""

    @property
    def is_leader(self) -> bool:
        return self.rank == LEADER
