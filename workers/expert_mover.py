"""A rank's part of expert balancing: it does what a step's orders say, between the steps, together with all other ranks.

Life cycle: made once the model is loaded, so that its buffers and the ranks' connections are there before memory is measured;
`follow` is called with each plan that has orders, on every rank. The weights move on the stream on which the steps run, and the
maps change behind them: what was queued before finds experts where they were, what comes after where they are. So no step
ever reads a slot that is being written, and a step with orders takes longer by the bytes it moves, which are bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from ..models.causal_lm import CausalLM
from ..models.layers.expert_map import MovableExpertMap
from ..models.layers.moe import SparseMlp
from ..scheduler.expert_writes import MIN_LIMIT
from ..scheduler.step_plan import ExpertOrders, SlotWrite
from .comm import RankGroup

# That a rank sends in one step, and receives: about 0.2 ms by NVLink, 1 ms between nodes.
_STEP_BYTES = 32 << 20


class ExpertMover:
    """See the module.

    Attributes:
        num_layers: sparse ones, by whose number orders name a layer.
        num_experts: of each.
        writes_per_step: what a rank can read, and write, with one step's orders.
    """

    def __init__(self, model: CausalLM, group: RankGroup) -> None:
        self._group = group
        self._layers = [layer.mlp for layer in model.decoder_layers if isinstance(layer.mlp, SparseMlp)]
        self._maps = [_movable(layer) for layer in self._layers]
        self.num_layers, self.num_experts = len(self._layers), self._maps[0].num_experts
        self._slots_per_rank, self._rank = self._layers[0].slots.size, group.place.number
        expert_bytes = sum(weight[0].nbytes for weight in self._layers[0].experts.of_slots)
        self.writes_per_step = max(MIN_LIMIT, min(_STEP_BYTES // expert_bytes, self._slots_per_rank))
        self._outgoing, self._incoming = (
            torch.empty((self.writes_per_step, expert_bytes), dtype=torch.uint8, device=model.device) for _ in range(2)
        )
        row_each = torch.zeros((group.place.num_ranks, 1), dtype=torch.uint8, device=model.device)
        ones = [1] * group.place.num_ranks
        group.exchange_rows(torch.empty_like(row_each), row_each, received=ones, sent=ones)  # connects each rank with each

    def forget_loads(self) -> None:
        """What was computed to try things out says nothing about the experts."""
        for layer_map in self._maps:
            layer_map.loads_E.zero_()

    def follow(self, orders: ExpertOrders) -> torch.Tensor | None:
        """Queues the work. The loads int64 [layers, experts] of all ranks together, where they are asked for."""
        loads_LE = None
        if orders.reads_loads:
            loads_LE = torch.stack([layer_map.loads_E for layer_map in self._maps])
            self._group.sum_over_all(loads_LE)
            self.forget_loads()
        if orders.writes:
            self._write(self._layers[orders.layer].experts.of_slots, orders.writes)
            layer_map = self._maps[orders.layer]
            # On a GPU the table is copied from the host: a kernel that starts early (dependent_launch.py) does not pass a copy,
            # so none reads weights before they are written.
            layer_map.place(layer_map.after(orders.writes))
        return loads_LE

    def _write(self, slot_weights: Sequence[torch.Tensor], writes: Sequence[SlotWrite]) -> None:
        """All ranks do this together. Between two ranks, weights travel in the order of the writes."""
        outgoing = sorted((w for w in writes if self._rank_of(w.source) == self._rank), key=lambda w: self._rank_of(w.slot))
        incoming = sorted((w for w in writes if self._rank_of(w.slot) == self._rank), key=lambda w: self._rank_of(w.source))
        for row, write in zip(self._outgoing, outgoing, strict=False):
            for part, weights in _parts(row, slot_weights, write.source % self._slots_per_rank):
                part.copy_(weights)
        sent = Counter(self._rank_of(write.slot) for write in outgoing)
        received = Counter(self._rank_of(write.source) for write in incoming)
        ranks = range(self._group.place.num_ranks)
        self._group.exchange_rows(
            self._incoming[: len(incoming)],
            self._outgoing[: len(outgoing)],
            received=[received[rank] for rank in ranks],
            sent=[sent[rank] for rank in ranks],
        )
        for row, write in zip(self._incoming, incoming, strict=False):
            for part, weights in _parts(row, slot_weights, write.slot % self._slots_per_rank):
                weights.copy_(part)

    def _rank_of(self, slot: int) -> int:
        return slot // self._slots_per_rank


def _movable(layer: SparseMlp) -> MovableExpertMap:
    assert isinstance(layer.map, MovableExpertMap), "the model was built with experts that stay where they are"
    return layer.map


def _parts(row: torch.Tensor, slot_weights: Sequence[torch.Tensor], slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(a part of a buffer's row, the weights whose bytes lie there, flat) for each tensor of a slot."""
    weights = [weight[slot].view(-1).view(torch.uint8) for weight in slot_weights]
    return list(zip(row.split([len(flat) for flat in weights]), weights, strict=True))
