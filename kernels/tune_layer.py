"""What `tune` measures for the rest of a layer behind its attention: one kernel against one for each op."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from .attend import prepare_and_attend
from .between_attentions import (
    EXPERTS,
    MAX_PAIRS,
    MAX_ROWS,
    LayerWeights,
    Next,
    Router,
    fused_layer,
    new_counter,
    plan_memory,
    separate_layer,
)
from .cuda import loader
from .expert_terms import sum_terms
from .graph_timing import num_calls, num_copies
from .tune_linear import SHAPES
from .tune_moe import MOE_SHAPES
from .tuning import Config

LAYER_ROWS = (1, 2, 4, 8)
EPS = 1e-6
HEAD_DIM, NUM_KEYS, PAGE_LEN = 128, 512, 16  # of the attention in front
MAX_SPARSE_COPIES = 4  # of a layer whose experts are mostly not read


@dataclass(frozen=True)
class LayerCase:
    """So many rows of a bfloat16 layer of `sizes` (hidden, attended, intermediate, experts, choices, outputs of the next)."""

    sizes: tuple[int, int, int, int, int, int]
    num_rows: int
    op: str = "between_attentions"

    @property
    def read_bytes(self) -> int:
        hidden, attended_size, intermediate, num_experts, choices, num_outputs = self.sizes
        chosen = num_experts * (1 - (1 - choices / num_experts) ** self.num_rows)  # that many on the average
        router = num_experts if num_experts > 1 else 0
        return round(2 * hidden * (attended_size + router + 3 * intermediate * chosen + num_outputs))

    @property
    def baseline(self) -> Config:
        return {"kernel": "separate"}

    @property
    def keeps_twin(self) -> bool:
        return False

    def neighbour(self) -> Callable[[], object]:
        """The attention in front, of rows with NUM_KEYS keys."""
        _, attended_size, _, _, _, num_outputs = self.sizes
        heads, kv_heads = attended_size // HEAD_DIM, (num_outputs - attended_size) // (2 * HEAD_DIM)
        pages = NUM_KEYS // PAGE_LEN
        qkv = torch.randn(self.num_rows, num_outputs // HEAD_DIM, HEAD_DIM, device="cuda").bfloat16()
        q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), dim=1)
        caches = torch.randn(2, self.num_rows * pages, PAGE_LEN, kv_heads, HEAD_DIM, device="cuda").bfloat16()
        tables = torch.arange(self.num_rows * pages, device="cuda").int().view(self.num_rows, pages)
        angles, gain = torch.rand(NUM_KEYS, HEAD_DIM // 2, device="cuda"), torch.ones(HEAD_DIM, device="cuda").bfloat16()
        positions = torch.full((self.num_rows,), NUM_KEYS - 1, device="cuda")
        return partial(
            prepare_and_attend,
            q,
            k,
            v,
            angles.cos(),
            angles.sin(),
            positions,
            caches[0],
            caches[1],
            (torch.arange(self.num_rows, device="cuda") + 1) * NUM_KEYS - 1,
            tables,
            torch.arange(self.num_rows + 1, device="cuda").int(),
            positions.int() + 1,
            max_query_len=1,
            min_query_len=1,
            q_norm_D=gain,
            k_norm_D=gain,
            norm_eps=EPS,
            scale=HEAD_DIM**-0.5,
            window=None,
            soft_cap=None,
            sinks_N=None,
        )

    def candidates(self) -> list[Config]:
        _, _, _, num_experts, choices, _ = self.sizes
        is_known = num_experts == 1 or num_experts in EXPERTS
        is_small = self.num_rows <= MAX_ROWS and self.num_rows * choices <= MAX_PAIRS
        if not (is_known and is_small and loader.can_run_on(torch.device("cuda", 0))):
            return []
        if not plan_memory(self.num_rows, self.sizes[:5]).holds_chunks(self.sizes[:5]):
            return []
        prefetches = (0, 1 << 20) if num_experts > 1 else (0,)
        return [
            {"kernel": "fused", "max_in_flight": max_in_flight, "prefetches": numbers}
            for max_in_flight, numbers in product((1, 2, 3, 4), prefetches)
        ]

    def calls(self, config: Config | None, *, num_weights: int | None = None) -> list[Callable[[], torch.Tensor]]:
        """Calls on layers in turn."""
        copies = num_weights or num_copies(self.read_bytes)
        if self.sizes[3] > 1:
            copies = min(copies, MAX_SPARSE_COPIES)
        generator = torch.Generator("cuda").manual_seed(0)
        inputs = (
            _random(self.num_rows, self.sizes[1], generator=generator),
            _random(self.num_rows, self.sizes[0], generator=generator),
        )
        layers = [make_layer(self.sizes, generator) for _ in range(copies)]
        run = partial(_run_separate, *inputs)
        if config is not None and config["kernel"] == "fused":
            run = partial(_run_fused, config, new_counter(torch.device("cuda", torch.cuda.current_device())), *inputs)
        times = 1 if num_weights else num_calls(self.read_bytes)
        return [partial(run, *layers[i % copies]) for i in range(times)]


def _run_separate(attended: torch.Tensor, residual: torch.Tensor, layer: LayerWeights, following: Next) -> torch.Tensor:
    return sum_terms(separate_layer(attended, residual, layer, following)[0])


def _run_fused(
    config: Config, counter: torch.Tensor, attended: torch.Tensor, residual: torch.Tensor, layer: LayerWeights, following: Next
) -> torch.Tensor:
    return fused_layer(attended, residual, layer, following, counter=counter, config=config)[0]


def _random(*shape: int, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    tensor = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    return tensor.normal_(0, scale, generator=generator)


def make_layer(sizes: tuple[int, int, int, int, int, int], generator: torch.Generator) -> tuple[LayerWeights, Next]:
    """Random weights of a case's `sizes`."""
    hidden, attended_size, intermediate, num_experts, choices, num_outputs = sizes
    gain = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    matrix = partial(_random, generator=generator)
    router = None
    if num_experts > 1:
        router = Router(matrix(num_experts, hidden, scale=hidden**-0.5), choices, renormalize=True)
    layer = LayerWeights(
        output_HQ=matrix(hidden, attended_size, scale=attended_size**-0.5),
        norm_H=gain,
        eps=EPS,
        gate_up_EUH=matrix(num_experts, 2 * intermediate, hidden, scale=hidden**-0.5),
        down_EHF=matrix(num_experts, hidden, intermediate, scale=intermediate**-0.5),
        activation="silu",
        router=router,
    )
    return layer, Next(gain, EPS, matrix(num_outputs, hidden, scale=hidden**-0.5))


def layer_cases(shapes: Iterable[str], rows: Iterable[int] = LAYER_ROWS) -> list[LayerCase]:
    """Of the layers of the named models."""
    cases = []
    for name in shapes:
        qkv, output, *others = [layer for layer in SHAPES[name] if layer.op != "linear_float32"]
        num_experts, choices, intermediate = 1, 1, 0
        if name in MOE_SHAPES:
            num_experts, choices, _, intermediate = MOE_SHAPES[name]
        else:
            intermediate = next(layer.num_outputs // 2 for layer in others if layer.op == "gated_linear")
        sizes = (output.num_outputs, output.num_inputs, intermediate, num_experts, choices, qkv.num_outputs)
        cases += [LayerCase(sizes, num_rows) for num_rows in rows if num_rows <= MAX_ROWS]
    return list(dict.fromkeys(cases))
