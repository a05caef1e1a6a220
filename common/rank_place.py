"""Where a worker stands among those that compute one replica together."""

from __future__ import annotations

from dataclasses import dataclass

LEADER = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """Rank `rank` of `size` under `epoch`.

    Attributes:
        address: "host:port" where the ranks find each other; the leader has opened it.
        host: this rank's own address, on which the others reach it.
        timeout_s: of every collective, and of the wait for all ranks to come.
        whole_experts: ranks share the experts of sparse layers instead of each expert's intermediate size.
        num_redundant_experts, rebalance_interval_steps: as in ParallelConfig; with an interval experts may move.
    """

    rank: int
    size: int
    epoch: int
    address: str
    host: str
    timeout_s: float
    whole_experts: bool = False
    num_redundant_experts: int = 0
    rebalance_interval_steps: int = 0

    @property
    def balances_experts(self) -> bool:
        return self.rebalance_interval_steps > 0

    @property
    def is_leader(self) -> bool:
        return self.rank == LEADER
