"""Brings tokens to the ranks that keep their experts, and the experts' weighted sums back.

A dispatcher knows which slots this rank keeps (expert_map.py) and calls the experts with them numbered from 0; -1 is a choice
that another rank serves. What it returns is this rank's part of a sum over the ranks that share a token (Parallel.sum).

T tokens, C choices, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..parallel import Share

# experts(x_TH, weights_TC, slots_TC) -> out_TH: the weighted sum of each token's choices among this rank's slots.
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class LocalDispatcher:
    """For ranks that all have the same tokens: each computes its own slots' part, and nothing moves."""

    def __init__(self, slots: Share) -> None:
        self._slots = slots

    def run(self, x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor, experts: Experts) -> torch.Tensor:
        """out [T, H]. `slots` int32, of all ranks."""
        return experts(x_TH, weights_TC, own_slots(slots_TC, self._slots))


def own_slots(slots_TC: torch.Tensor, mine: Share) -> torch.Tensor:
    """This rank's slots numbered from 0, -1 for those of others: int32 [T, C]."""
    if mine.size == mine.total:
        return slots_TC
    local_TC = slots_TC - mine.start
    return torch.where((local_TC >= 0) & (local_TC < mine.size), local_TC, -1)
