"""What `tune` measures for mixture-of-experts layers: their shapes in known models, and the configs worth trying on each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import triton

from .cuda import loader
from .expert_terms import Summands, sum_terms
from .graph_timing import num_calls
from .grouped_tiles import GroupedConfig
from .moe_config import MoeConfig, MoeSizes, gemv_block_k, parse_config, rule, table_config
from .moe_gemv import GemvConfig
from .moe_mlp import run_down, run_gate_up
from .moe_sort import sort_pairs
from .streaming_experts import StreamingConfig
from .tall_experts import TALL_CONFIGS
from .tuning import Config

# (experts, choices, hidden, intermediate) of a model's sparse layers on one GPU.
MOE_SHAPES = {"qwen3-30b-a3b": (128, 8, 2048, 768)}
MOE_ROWS = tuple(2**exponent for exponent in range(14))
OPS = ("moe_gate_up", "moe_down")
MAX_GEMV_ROWS = 16  # beyond, two tokens share an expert too often
MAX_STREAMING_ROWS = 128
# Tall tiles (block_m, block_n, block_k, num_warps, num_stages, tma, persistent). A gated tile is twice as wide. Two tiles of 4
# warps and at most 113 KB (stages of (block_m + width) * block_k) fit a multiprocessor: one computes while the other fills or
# stores.
TALL_TILES = {
    "moe_gate_up": [
        (64, 64, 64, 4, 4, False, False),
        (64, 128, 64, 8, 4, False, False),
        (128, 64, 64, 4, 3, False, False),
        (128, 128, 64, 8, 3, False, False),
    ],
    "moe_down": [
        (64, 128, 64, 4, 4, True, True),
        (64, 256, 64, 4, 3, True, False),
        (64, 256, 64, 8, 4, False, False),
        (128, 128, 64, 4, 3, True, False),
        (128, 128, 64, 4, 3, True, True),
        (128, 256, 64, 8, 4, True, False),
        (128, 256, 64, 8, 3, True, True),
        (128, 256, 64, 8, 4, True, True),
    ],
}
# (block_n, block_k, num_warps, num_stages, prefetch_lines): short ones, of 16 or 32 pairs.
SHORT_TILES = {
    "moe_gate_up": [
        (16, 256, 4, 4, 0),
        (32, 128, 4, 4, 0),
        (32, 128, 4, 4, 8),
        (32, 256, 4, 3, 0),
        (32, 256, 4, 3, 8),
        (64, 64, 4, 4, 4),
        (64, 128, 4, 3, 8),
    ],
    "moe_down": [
        (64, 128, 4, 3, 0),
        (64, 128, 4, 3, 8),
        (64, 256, 4, 3, 8),
        (128, 64, 4, 4, 0),
        (128, 64, 4, 4, 4),
        (128, 128, 4, 3, 8),
    ],
}
# (tile, rows, num_stages, programs): as many programs as fit an H200 at once.
STREAMING_TILES = [
    (64, 8, 9, 264),
    (64, 16, 6, 396),
    (128, 8, 6, 264),
    (128, 8, 12, 132),
    (128, 16, 5, 264),
    (256, 16, 6, 132),
]
MIN_TALL_PAIRS = 16  # of an expert on average, for the tall kernel
GEMV_TILES = {
    "moe_gate_up": [(1, 2048, 2), (1, 2048, 4), (2, 2048, 4), (2, 2048, 8), (4, 2048, 8), (4, 2048, 16)],
    "moe_down": [(1, 256, 4), (2, 256, 4), (2, 256, 8), (4, 256, 8), (4, 256, 16), (8, 256, 16)],
}


@dataclass(frozen=True)
class MoeCase:
    """One GEMM of one layer in bfloat16.

    The time of the first includes the sorting where its kernel needs it, the second's the sum.

    Attributes:
        moe: of one rank.
        num_expert_ranks: ranks that have as many experts each; tokens choose from all, and this rank computes its own.
    """

    op: str
    moe: MoeSizes
    num_expert_ranks: int = 1

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
        touched = moe.num_experts * (1 - (1 - moe.num_choices / self._num_choosable) ** moe.num_tokens)
        return round(touched) * moe.hidden * moe.intermediate * (4 if self.op == "moe_gate_up" else 2)

    @property
    def _num_choosable(self) -> int:
        return self.moe.num_experts * self.num_expert_ranks

    @property
    def baseline(self) -> Config:
        return table_config(rule(self.op, self.moe, element_size=2))

    @property
    def keeps_twin(self) -> bool:
        return False

    def neighbour(self) -> None:
        """Calls follow each other."""

    def candidates(self) -> list[Config]:
        return [table_config(config) for config in self._configs()]

    def calls(self, config: Config | None, *, num_weights: int | None = None) -> list[Callable[[], torch.Tensor]]:
        """Calls on one layer's weights, which are larger than L2, each with experts of its own; with `num_weights` one call."""
        parsed = rule(self.op, self.moe, element_size=2) if config is None else parse_config(config)
        generator = torch.Generator("cuda").manual_seed(0)
        moe = self.moe
        # As two grouped GEMMs lay h out between them; in the order of pair where a matrix-vector kernel is compared with one.
        sorted_rows = moe.num_tokens > MAX_GEMV_ROWS
        rows, columns = (2 * moe.intermediate, moe.hidden) if self.op == "moe_gate_up" else (moe.hidden, moe.intermediate)
        weight = torch.empty(moe.num_experts, rows, columns, device="cuda", dtype=torch.bfloat16)
        weight.normal_(0, columns**-0.5, generator=generator)
        num_inputs = moe.num_tokens * (1 if self.op == "moe_gate_up" else moe.num_choices)
        x = torch.randn(num_inputs, columns, device="cuda", generator=generator).bfloat16()
        calls: list[Callable[[], torch.Tensor]] = []
        for _ in range(1 if num_weights else num_calls(self.read_bytes)):
            scores = torch.rand(moe.num_tokens, self._num_choosable, device="cuda", generator=generator)
            weights_TC, experts_TC = scores.topk(moe.num_choices)
            experts_TC = torch.where(experts_TC < moe.num_experts, experts_TC, -1).int()
            if self.op == "moe_gate_up":
                call = partial(_sort_and_gate_up, x, weight, experts_TC, config=parsed, sorted_rows=sorted_rows)
                calls.append(partial(_own_rows, call, experts_TC, sorted_rows=sorted_rows) if num_weights else call)
            else:
                order = sort_pairs(experts_TC, moe.num_experts)
                torch.cuda.synchronize()  # as run_down asks of a caller that has not launched run_gate_up just before
                down = partial(run_down, x, weight, weights_TC, experts_TC, order, after_gate_up=True)
                calls.append(partial(_down_and_sum, partial(down, config=parsed, sorted_rows=sorted_rows)))
        return calls

    def _configs(self) -> Iterable[MoeConfig]:
        moe = self.moe
        num_inputs = moe.hidden if self.op == "moe_gate_up" else moe.intermediate
        if moe.num_tokens <= MAX_GEMV_ROWS:
            for block_n, most, num_warps in GEMV_TILES[self.op]:
                yield GemvConfig(block_n=block_n, block_k=gemv_block_k(num_inputs, most=most), num_warps=num_warps)
        average = triton.cdiv(moe.num_tokens * moe.num_choices, self._num_choosable)
        if moe.num_tokens > 1 and average <= 32:
            for block_m in (16,) if average <= 4 else (16, 32):
                for block_n, block_k, num_warps, num_stages, prefetch_lines in SHORT_TILES[self.op]:
                    yield GroupedConfig(
                        block_m=block_m,
                        block_n=block_n,
                        block_k=block_k,
                        num_warps=num_warps,
                        num_stages=num_stages,
                        prefetch_lines=prefetch_lines,
                    )
        if 1 < moe.num_tokens <= MAX_STREAMING_ROWS and _is_on_hopper():
            for tile, rows, num_stages, programs in STREAMING_TILES:
                yield StreamingConfig(tile=tile, rows=rows, num_stages=num_stages, programs=programs)
        if average >= MIN_TALL_PAIRS and _is_on_hopper():
            yield from TALL_CONFIGS
        if average >= 16:
            for block_m, block_n, block_k, num_warps, num_stages, tma, persistent in TALL_TILES[self.op]:
                if average >= 64 if block_m == 128 else average < 256:
                    yield GroupedConfig(
                        block_m=block_m,
                        block_n=block_n,
                        block_k=block_k,
                        num_warps=num_warps,
                        num_stages=num_stages,
                        tma=tma,
                        persistent=persistent,
                    )


def _is_on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == loader.CAPABILITY


def _own_rows(call: Callable[[], torch.Tensor], experts_TC: torch.Tensor, *, sorted_rows: bool) -> torch.Tensor:
    """The rows of this rank's pairs; the others are not written."""
    is_own_P = experts_TC.flatten() >= 0
    h_PF = call()
    return h_PF[: int(is_own_P.sum())] if sorted_rows else h_PF[is_own_P]


def _sort_and_gate_up(
    x_TH: torch.Tensor, gate_up_weight_EUH: torch.Tensor, experts_TC: torch.Tensor, *, config: MoeConfig, sorted_rows: bool
) -> torch.Tensor:
    order = None if isinstance(config, GemvConfig) else sort_pairs(experts_TC, gate_up_weight_EUH.shape[0])
    return run_gate_up(x_TH, gate_up_weight_EUH, experts_TC, order, "silu", config=config, sorted_rows=sorted_rows)


def _down_and_sum(down: Callable[[], Summands]) -> torch.Tensor:
    return sum_terms(down())


def moe_cases(shapes: Iterable[str], rows: Iterable[int] = MOE_ROWS, *, num_ranks: int = 1) -> list[MoeCase]:
    """Both GEMMs of the sparse layers of the named models for each number of tokens; none for models that have none.

    Of several ranks both ways to share them: whole experts, and every expert's intermediate size.
    """
    cases = []
    for experts, choices, hidden, intermediate in (MOE_SHAPES[name] for name in shapes if name in MOE_SHAPES):
        shares = {(experts // num_ranks, intermediate, num_ranks), (experts, intermediate // num_ranks, 1)}
        for (num_experts, num_rows, num_expert_ranks), num_tokens in itertools.product(sorted(shares), rows):
            sizes = MoeSizes(
                num_tokens=num_tokens, num_choices=choices, num_experts=num_experts, hidden=hidden, intermediate=num_rows
            )
            cases += [MoeCase(op, sizes, num_expert_ranks) for op in OPS]
    return cases
