"""Where a worker stands among those that compute one replica together."""

from __future__ import annotations

from dataclasses import dataclass

from .identity import Identity

LEADER = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """Tensor rank `rank` of `size`, on data rank `data_rank` of `data_size`, under `epoch`.

    Tensor ranks share every layer of the model and have the same sequences, which the first of them, the leader, schedules.
    Data ranks have sequences of their own and share experts alone, so a replica has a leader a data rank.

    Attributes:
        address: "host:port" where the ranks find each other; the first of them has opened it.
        host: this rank's own address, on which the others reach it.
        timeout_s: of every collective, and of the wait for all ranks to come.
        start_timeout_s: of collectives while the ranks load and compile, for which one may take much longer than another.
        whole_experts: ranks share the experts of sparse layers instead of each expert's intermediate size.
        num_redundant_experts, rebalance_interval_steps: as in ParallelConfig; with an interval experts may move.
        gpu: which of the GPUs that this rank's process sees it takes, where it takes one.
        identity: this rank's, and `leader_name` the name in the leader's: ranks on other machines than the leader's need them.
    """

    rank: int
    size: int
    epoch: int
    address: str
    host: str
    timeout_s: float
    start_timeout_s: float = 600.0
    whole_experts: bool = False
    num_redundant_experts: int = 0
    rebalance_interval_steps: int = 0
    data_rank: int = 0
    data_size: int = 1
    gpu: int = 0
    identity: Identity | None = None
    leader_name: str = ""

    @property
    def balances_experts(self) -> bool:
        return self.rebalance_interval_steps > 0

    @property
    def is_leader(self) -> bool:
        return self.rank == LEADER

    @property
    def number(self) -> int:
        """Among all ranks of the replica: the tensor ranks of a data rank are neighbours."""
        return self.data_rank * self.size + self.rank

    @property
    def num_ranks(self) -> int:
        return self.data_size * self.size
