"""What `tune` measures for mixture-of-experts layers: their shapes in known models, and the configs worth trying on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import triton

from .graph_timing import num_calls
from .grouped_gemm import GroupedConfig
from .moe_config import MoeConfig, MoeSizes, gemv_block_k, num_slices, parse_config, rule, table_config
from .moe_gemv import GemvConfig
from .moe_mlp import run_down, run_gate_up
from .moe_sort import sort_pairs
from .tuning import Config

# (experts, choices, hidden, intermediate) of a model's sparse layers on one GPU.
MOE_SHAPES = {"qwen3-30b-a3b": (128, 8, 2048, 768)}
MOE_ROWS = tuple(2**exponent for exponent in range(14))
OPS = ("moe_gate_up", "moe_down")
MAX_GEMV_ROWS = 8  # beyond, two tokens share an expert too often
# (block_m, block_n, block_k, num_warps, num_stages) of tall tiles. A gated tile is twice as wide. Two tiles of 4 warps and at
# most 113 KB (stages of (block_m + width) * block_k) fit a multiprocessor: one computes while the other fills or stores.
TALL_TILES = {
    "moe_gate_up": [
        (64, 64, 64, 4, 4),
        (64, 128, 64, 8, 4),
        (128, 64, 64, 4, 3),
        (128, 64, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
    ],
    "moe_down": [
        (64, 128, 64, 4, 4),
        (64, 256, 64, 8, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
    ],
}
# Tall tiles for programs that go through all tiles of an expert.
OVERLAPPED_TILES = {
    "moe_gate_up": [(64, 128, 64, 8, 3), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3)],
    "moe_down": [(64, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)],
}
# (block_n, block_k, num_warps, num_stages): short ones, of 16 or 32 pairs.
SHORT_TILES = {
    "moe_gate_up": [(16, 128, 4, 4), (16, 256, 4, 4), (32, 128, 4, 3), (32, 128, 4, 5), (32, 256, 4, 3), (64, 64, 4, 4)],
    "moe_down": [(32, 128, 4, 4), (32, 256, 4, 3), (64, 128, 4, 3), (64, 128, 4, 5), (64, 256, 4, 3), (128, 64, 4, 4)],
}
GEMV_TILES = {
    "moe_gate_up": [(1, 2048, 2), (1, 2048, 4), (1, 2048, 8), (2, 2048, 4), (2, 2048, 8), (4, 2048, 8), (4, 2048, 16)],
    "moe_down": [(1, 256, 4), (1, 256, 8), (2, 256, 4), (2, 256, 8), (4, 256, 8), (4, 256, 16)],
}


@dataclass(frozen=True)
class MoeCase:
    """One GEMM of one layer in bfloat16; the time of the first includes sorting where it is needed, the second's the sum."""

    op: str
    moe: MoeSizes

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.moe.key

    @property
    def num_rows(self) -> int:
        return self.moe.num_tokens

    @property
    def read_bytes(self) -> int:
        """Weights of the experts that so many tokens touch on average when they choose at random."""
        moe = self.moe
        touched = moe.num_experts * (1 - (1 - moe.num_choices / moe.num_experts) ** moe.num_tokens)
        return round(touched) * moe.hidden * moe.intermediate * (4 if self.op == "moe_gate_up" else 2)

    @property
    def baseline(self) -> Config:
        return table_config(rule(self.op, self.moe, element_size=2))

    def candidates(self) -> list[Config]:
        return [table_config(config) for config in self._configs()]

    def calls(self, config: Config | None, *, num_weights: int | None = None) -> list[Callable[[], torch.Tensor]]:
        """Calls on one layer's weights, which are larger than L2, each with experts of its own; with `num_weights` one call."""
        parsed = rule(self.op, self.moe, element_size=2) if config is None else parse_config(config)
        generator = torch.Generator("cuda").manual_seed(0)
        moe = self.moe
        rows, columns = (2 * moe.intermediate, moe.hidden) if self.op == "moe_gate_up" else (moe.hidden, moe.intermediate)
        weight = torch.empty(moe.num_experts, rows, columns, device="cuda", dtype=torch.bfloat16)
        weight.normal_(0, columns**-0.5, generator=generator)
        num_inputs = moe.num_tokens * (1 if self.op == "moe_gate_up" else moe.num_choices)
        x = torch.randn(num_inputs, columns, device="cuda", generator=generator).bfloat16()
        calls: list[Callable[[], torch.Tensor]] = []
        for _ in range(1 if num_weights else num_calls(self.read_bytes)):
            scores = torch.rand(moe.num_tokens, moe.num_experts, device="cuda", generator=generator)
            weights_TC, experts_TC = scores.topk(moe.num_choices)
            experts_TC = experts_TC.int()
            if self.op == "moe_gate_up":
                calls.append(partial(_sort_and_gate_up, x, weight, experts_TC, parsed))
            else:
                order = sort_pairs(experts_TC, moe.num_experts)
                calls.append(partial(run_down, x, weight, weights_TC, experts_TC, order, config=parsed))
        return calls

    def _configs(self) -> Iterable[MoeConfig]:
        moe = self.moe
        num_inputs = moe.hidden if self.op == "moe_gate_up" else moe.intermediate
        if moe.num_tokens <= MAX_GEMV_ROWS:
            for block_n, most, num_warps in GEMV_TILES[self.op]:
                yield GemvConfig(block_n=block_n, block_k=gemv_block_k(num_inputs, most=most), num_warps=num_warps)
        average = triton.cdiv(moe.num_tokens * moe.num_choices, moe.num_experts)
        if moe.num_tokens > 1 and average <= 32:
            for block_m in (16,) if average <= 4 else (16, 32):
                yield from self._grouped(((block_m, *tile) for tile in SHORT_TILES[self.op]), overlap_tiles=False)
        if average >= 16:
            yield from self._grouped(TALL_TILES[self.op], overlap_tiles=False)
        if average >= 256:
            yield from self._grouped(OVERLAPPED_TILES[self.op], overlap_tiles=True)

    def _grouped(self, tiles: Iterable[tuple[int, ...]], *, overlap_tiles: bool) -> Iterable[GroupedConfig]:
        for block_m, block_n, block_k, num_warps, num_stages in tiles:
            yield GroupedConfig(
                block_m=block_m,
                block_n=block_n,
                block_k=block_k,
                num_slices=1 if overlap_tiles else num_slices(self.moe, block_m),
                num_warps=num_warps,
                num_stages=num_stages,
                overlap_tiles=overlap_tiles,
            )


def _sort_and_gate_up(
    x_TH: torch.Tensor, gate_up_weight_EUH: torch.Tensor, experts_TC: torch.Tensor, config: MoeConfig
) -> torch.Tensor:
    order = None if isinstance(config, GemvConfig) else sort_pairs(experts_TC, gate_up_weight_EUH.shape[0])
    return run_gate_up(x_TH, gate_up_weight_EUH, experts_TC, order, "silu", config=config)


def moe_cases(shapes: Iterable[str], rows: Iterable[int] = MOE_ROWS) -> list[MoeCase]:
    """Both GEMMs of the sparse layers of the named models for each number of tokens; none for models that have none."""
    cases = []
    for experts, choices, hidden, intermediate in (MOE_SHAPES[name] for name in shapes if name in MOE_SHAPES):
        for num_tokens in rows:
            sizes = MoeSizes(
                num_tokens=num_tokens, num_choices=choices, num_experts=experts, hidden=hidden, intermediate=intermediate
            )
            cases += [MoeCase(op, sizes) for op in OPS]
    return cases
