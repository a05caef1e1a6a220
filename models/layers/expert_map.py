"""Which expert lies where: the experts that a router knows, and the slots in which ranks keep their weights.

A slot is a place for one expert's weights; slots are numbered over all ranks, and each rank keeps a run of them. An expert and
its slot have the same number.

T tokens, C choices.
"""

from __future__ import annotations

import torch

from ..parallel import Share


class ExpertMap:
    """Of one sparse layer."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_slots = num_experts

    def slots(self, experts_TC: torch.Tensor) -> torch.Tensor:
        """The slot that serves each choice: int32 [T, C]."""
        return experts_TC

    def experts_in(self, slots: Share) -> range:
        """The experts whose weights lie in `slots`, in their order."""
        return range(slots.start, slots.stop)
