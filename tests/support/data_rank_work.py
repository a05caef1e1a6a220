"""What data ranks do in tests: here, because processes that are spawned must be able to import it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pilotfish.kernels.moe_mlp import moe_mlp
from pilotfish.models.check import RankRows, compare_on_rank
from pilotfish.models.layers import expert_dispatch
from pilotfish.models.layers.expert_dispatch import Dispatcher, Experts, choose_dispatcher
from pilotfish.models.parallel import Parallel
from pilotfish.workers.comm import RankGroup

NUM_CHOICES = 2
HIDDEN, INTERMEDIATE = 128, 64
# What routers choose among the slots.
ROUTING = ("random", "all to the first slots", "all to the last slots")
Step = tuple[Sequence[int], str]  # (tokens of each data rank, routing)


class SparseLayer:
    """One layer's experts on one rank, and all of them in float64."""

    def __init__(self, parallel: Parallel, num_slots: int, device: torch.device) -> None:
        shared = torch.Generator().manual_seed(0)
        gate_up = torch.randn(num_slots, 2 * INTERMEDIATE, HIDDEN, generator=shared) / HIDDEN**0.5
        down = torch.randn(num_slots, HIDDEN, INTERMEDIATE, generator=shared) / INTERMEDIATE**0.5
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device, self.num_slots = device, num_slots
        self.slots, _ = parallel.expert_shares(num_slots, INTERMEDIATE)
        self.gate_up, self.down = gate_up.to(device, self.dtype), down.to(device, self.dtype)
        chooser = choose_dispatcher(parallel, self.slots, device=device)
        self.ways: dict[str, Dispatcher] = {
            "gather": chooser._gather,
            "all to all": chooser._all_to_all,
            "by shape": chooser,
        }

    @property
    def experts(self) -> Experts:
        gate_up, down = self.gate_up[self.slots.range], self.down[self.slots.range]
        return lambda x_TH, weights_TC, slots_TC: moe_mlp(x_TH, gate_up, down, weights_TC, slots_TC, "silu")

    def tokens(self, num_tokens: int, routing: str, *, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x, weights, slots)."""
        generator = torch.Generator().manual_seed(seed)
        x_TH = torch.randn(num_tokens, HIDDEN, generator=generator).to(self.device, self.dtype)
        weights_TC = torch.rand(num_tokens, NUM_CHOICES, generator=generator).to(self.device)
        first = {"random": None, "all to the first slots": 0, "all to the last slots": self.num_slots - NUM_CHOICES}[routing]
        if first is None:
            slots_TC = torch.rand(num_tokens, self.num_slots, generator=generator).topk(NUM_CHOICES).indices.int()
        else:
            slots_TC = torch.arange(first, first + NUM_CHOICES, dtype=torch.int32).expand(num_tokens, -1).contiguous()
        return x_TH, weights_TC, slots_TC.to(self.device)

    def in_one_place(self, x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor) -> torch.Tensor:
        """Every expert for every token, and then the chosen ones."""
        gate_STF, up_STF = (x_TH.double() @ self.gate_up.double().transpose(1, 2)).chunk(2, dim=-1)
        y_STH = torch.nn.functional.silu(gate_STF) * up_STF @ self.down.double().transpose(1, 2)
        chosen_TCH = y_STH[slots_TC.long(), torch.arange(len(x_TH), device=self.device).unsqueeze(1)]
        return (chosen_TCH * weights_TC.unsqueeze(2)).sum(1)


def dispatch(group: RankGroup, device: torch.device, num_slots: int, steps: Sequence[Step]) -> list[dict[str, float]]:
    """Each step's largest error of every dispatcher on this rank."""
    parallel = group.parallel
    assert parallel.data is not None
    layer, errors = SparseLayer(parallel, num_slots, device), []
    for number, (rank_tokens, routing) in enumerate(steps):
        num_tokens = rank_tokens[parallel.data.rank]
        parallel.data.begin(tuple(rank_tokens), num_tokens=num_tokens)
        tokens = layer.tokens(num_tokens, routing, seed=100 * number + parallel.data.rank)  # tensor ranks have the same
        outs = {name: parallel.sum(way.run(*tokens, layer.experts)) for name, way in layer.ways.items()}
        want = layer.in_one_place(*tokens)
        assert all(out.shape == want.shape and out.dtype == layer.dtype for out in outs.values())
        errors.append({name: float((out - want).abs().max()) for name, out in outs.items()})
    return errors


def replay_a_dispatch(group: RankGroup, device: torch.device, num_slots: int, num_tokens: int) -> float:
    """The largest error of a CUDA graph of a dispatch, replayed with other tokens than it was recorded with."""
    parallel = group.parallel
    assert parallel.data is not None
    layer = SparseLayer(parallel, num_slots, device)
    is_padding = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    parallel.data.begin((num_tokens,) * parallel.data.size, num_tokens=num_tokens, is_padding_T=is_padding)
    tokens = layer.tokens(num_tokens, "random", seed=parallel.data.rank)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer.ways["by shape"].run(*tokens, layer.experts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = layer.ways["by shape"].run(*tokens, layer.experts)
    worst = 0.0
    for seed in range(5):
        others = layer.tokens(num_tokens, "random", seed=10 * seed + parallel.data.rank)
        for tensor, other in zip(tokens, others, strict=True):
            tensor.copy_(other)
        graph.replay()
        worst = max(worst, float((out - layer.in_one_place(*others)).abs().max()))
    return worst


def compare_on_data_ranks(
    group: RankGroup, device: torch.device, checkpoints: Sequence[tuple[str, Sequence[str]]], most_gathered: int
) -> list[RankRows]:
    """Of each checkpoint, against what transformers says to the prompts of this data rank."""
    assert group.data is not None
    expert_dispatch.MAX_GATHERED_ROWS = most_gathered
    return [compare_on_rank(group.parallel, path, files[group.data.parallel.rank]) for path, files in checkpoints]
