"""Which expert lies where: the experts that a router knows, and the slots in which ranks keep their weights.

A slot is a place for one expert's weights; slots are numbered over all ranks, and each rank keeps a run of them.

T tokens, C choices, E experts, N columns of a table: 1 + the most copies that an expert may have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.expert_replicas import choose_replicas
from ..parallel import DataParallel, Parallel, Share


class ExpertMap:
    """Of one sparse layer. An expert and its slot have the same number."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_slots = num_experts

    def slots(self, experts_TC: torch.Tensor) -> torch.Tensor:
        """The slot that serves each choice: int32 [T, C]."""
        return experts_TC

    def experts_in(self, slots: Share) -> Sequence[int]:
        """The experts whose weights lie in `slots`, in their order."""
        return range(slots.start, slots.stop)


class MovableExpertMap(ExpertMap):
    """Experts with one slot or more, which change between steps. Counts the tokens that each expert gets.

    The device's tables stay where they are: what a CUDA graph has captured follows a change too.

    Attributes:
        copies_EN: as `choose_replicas` wants them.
        loads_E: int64, tokens that chose each expert since it was last zeroed. Padding counts where it is computed.
    """

    def __init__(
        self,
        num_experts: int,
        experts_of_slots: Sequence[int],
        *,
        data: DataParallel | None = None,
        device: torch.device,
    ) -> None:
        super().__init__(num_experts)
        self._data = data
        self.num_slots = len(experts_of_slots)
        self.loads_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        num_columns = 1 + 1 + self.num_slots - num_experts  # all other experts have one copy at least
        self.copies_EN = torch.empty((num_experts, num_columns), dtype=torch.int32, device=device)
        self.place(experts_of_slots)

    def slots(self, experts_TC: torch.Tensor) -> torch.Tensor:
        data = self._data
        if data is None:
            return choose_replicas(experts_TC, self.copies_EN, self.loads_E)
        # Each data rank begins at a turn of its own: few tokens each are not all for the first copies.
        return choose_replicas(experts_TC, self.copies_EN, self.loads_E, first_turn=data.rank, is_padding_T=data.is_padding_T)

    def experts_in(self, slots: Share) -> Sequence[int]:
        return self._experts_of_slots[slots.range]

    def place(self, experts_of_slots: Sequence[int]) -> None:
        """Work that is queued from here on finds the experts there. The host waits for nothing.

        Raises:
            ValueError: an expert is nowhere.
        """
        self._experts_of_slots = tuple(experts_of_slots)
        copies: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(experts_of_slots):
            copies[expert].append(slot)
        if nowhere := [expert for expert, slots in enumerate(copies) if not slots]:
            raise ValueError(f"experts {nowhere} have no slot")
        num_columns = self.copies_EN.shape[1]
        table = torch.tensor(
            [[len(slots), *slots] + [-1] * (num_columns - 1 - len(slots)) for slots in copies], dtype=torch.int32
        )
        self.copies_EN.copy_(table.pin_memory() if self.copies_EN.is_cuda else table, non_blocking=True)

    def after(self, writes: Sequence[tuple[int, int]]) -> list[int]:
        """The experts of all slots once (slot, source) of `writes` are done, which all read what was there before."""
        experts = list(self._experts_of_slots)
        for slot, source in writes:
            experts[slot] = self._experts_of_slots[source]
        return experts


def build_map(num_experts: int, parallel: Parallel, *, device: torch.device) -> ExpertMap:
    if parallel.first_slots is None:
        return ExpertMap(num_experts)
    return MovableExpertMap(num_experts, parallel.first_slots(num_experts), data=parallel.data, device=device)
