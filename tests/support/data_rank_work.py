"""What data ranks do in tests: here, because processes that are spawned must be able to import it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pilotfish.common.rank_place import RankPlace
from pilotfish.kernels.moe_mlp import moe_mlp
from pilotfish.models.layers.expert_dispatch import Dispatcher, choose_dispatcher
from pilotfish.models.parallel import Parallel
from pilotfish.workers.comm import RankGroup

HIDDEN, INTERMEDIATE, NUM_CHOICES = 24, 16, 2
# What routers choose among S slots.
ROUTING = ("random", "all to the first slots", "all to the last slots")


def join(number: int, *, address: str, tensor_size: int, data_size: int) -> RankGroup:
    """Rank `number` of tensor_size * data_size."""
    place = RankPlace(
        rank=number % tensor_size,
        size=tensor_size,
        data_rank=number // tensor_size,
        data_size=data_size,
        epoch=3,
        address=address,
        host="127.0.0.1",
        timeout_s=60,
        whole_experts=True,
    )
    return RankGroup.join(place, torch.device("cpu"))


def dispatch(
    ranks: Parallel, address: str, tensor_size: int, num_slots: int, steps: Sequence[tuple[Sequence[int], str]]
) -> list[dict[str, float]]:
    """Each step's largest error of both dispatchers on this rank, against all experts in float64. A step is (tokens of each
    data rank, what the router does)."""
    group = join(ranks.rank, address=address, tensor_size=tensor_size, data_size=ranks.size // tensor_size)
    parallel = group.parallel
    assert parallel.data is not None
    slots, _ = parallel.expert_shares(num_slots, INTERMEDIATE)
    shared = torch.Generator().manual_seed(0)
    gate_up = torch.randn(num_slots, 2 * INTERMEDIATE, HIDDEN, generator=shared) / HIDDEN**0.5
    down = torch.randn(num_slots, HIDDEN, INTERMEDIATE, generator=shared) / INTERMEDIATE**0.5
    chooser = choose_dispatcher(parallel, slots, device=torch.device("cpu"))
    ways: dict[str, Dispatcher] = {"gather": chooser._gather, "all to all": chooser._all_to_all, "by shape": chooser}

    def experts(x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor) -> torch.Tensor:
        return moe_mlp(x_TH, gate_up[slots.range], down[slots.range], weights_TC, slots_TC, "silu")

    errors = []
    for number, (rank_tokens, routing) in enumerate(steps):
        num_tokens = rank_tokens[parallel.data.rank]
        parallel.data.begin(tuple(rank_tokens), num_tokens=num_tokens, fixed_shapes=False)
        own = torch.Generator().manual_seed(100 * number + parallel.data.rank)  # tensor ranks have the same tokens
        x_TH = torch.randn(num_tokens, HIDDEN, generator=own)
        weights_TC = torch.rand(num_tokens, NUM_CHOICES, generator=own)
        first = {"random": None, "all to the first slots": 0, "all to the last slots": num_slots - NUM_CHOICES}[routing]
        if first is None:
            slots_TC = torch.rand(num_tokens, num_slots, generator=own).topk(NUM_CHOICES).indices.int()
        else:
            slots_TC = torch.arange(first, first + NUM_CHOICES, dtype=torch.int32).expand(num_tokens, -1).contiguous()
        want = in_one_place(x_TH.double(), gate_up.double(), down.double(), weights_TC.double(), slots_TC)
        outs = {name: parallel.sum(way.run(x_TH, weights_TC, slots_TC, experts)) for name, way in ways.items()}
        assert all(out.shape == x_TH.shape and out.dtype == x_TH.dtype for out in outs.values())
        errors.append({name: float((out - want).abs().max()) for name, out in outs.items()})
    return errors


def in_one_place(
    x_TH: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor
) -> torch.Tensor:
    """Every expert for every token, and then the chosen ones."""
    gate_STF, up_STF = (x_TH @ gate_up.transpose(1, 2)).chunk(2, dim=-1)
    y_STH = torch.nn.functional.silu(gate_STF) * up_STF @ down.transpose(1, 2)
    chosen_TCH = y_STH[slots_TC.long(), torch.arange(len(x_TH)).unsqueeze(1)]
    return (chosen_TCH * weights_TC.unsqueeze(2)).sum(1)
