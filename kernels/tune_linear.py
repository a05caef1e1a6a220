"""What `tune` measures for linear layers: their shapes in known models, and the configs worth trying on each.

N outputs (rows of the weight, gate and up together where the op is gated), K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import triton

from .gated_activation import gated_activation
from .gated_linear import gated_linear
from .graph_timing import num_calls, num_copies
from .linear import cublas_linear, linear
from .rms_norm import rms_norm
from .skinny_linear import MAX_GEMV_INPUTS, MAX_SKINNY_ROWS, skinny_linear
from .streaming_linear import MAX_STREAMING_ROWS, STEP_INPUTS, TILES, stages_within
from .tall_linear import TALL_CONFIGS
from .tuning import Config


class Layer(NamedTuple):
    """A linear layer of a model on one GPU, and which of its dimensions ranks share ("" none)."""

    op: str
    num_outputs: int
    num_inputs: int
    shared: Literal["outputs", "inputs", ""] = "outputs"

    def on_rank(self, num_ranks: int) -> Layer:
        """ValueError where it does not divide."""
        size = {"outputs": self.num_outputs, "inputs": self.num_inputs, "": 0}[self.shared]
        if size % num_ranks:
            raise ValueError(f"{num_ranks} ranks do not share the {size} {self.shared} of a layer evenly")
        if self.shared == "inputs":
            return self._replace(num_inputs=size // num_ranks)
        return self._replace(num_outputs=size // num_ranks) if self.shared else self


# q k v together, attention output, gate and up, down, router, head.
SHAPES: dict[str, list[Layer]] = {
    "qwen3-8b": [
        Layer("linear", 6144, 4096),
        Layer("linear", 4096, 4096, "inputs"),
        Layer("gated_linear", 24576, 4096),
        Layer("linear", 4096, 12288, "inputs"),
        Layer("linear_float32", 151936, 4096),
    ],
    "qwen3-0.6b": [
        Layer("linear", 4096, 1024),
        Layer("linear", 1024, 2048, "inputs"),
        Layer("gated_linear", 6144, 1024),
        Layer("linear", 1024, 3072, "inputs"),
        Layer("linear_float32", 151936, 1024),
    ],
    "qwen3-30b-a3b": [
        Layer("linear", 5120, 2048),
        Layer("linear", 2048, 4096, "inputs"),
        Layer("linear", 128, 2048, ""),
        Layer("linear_float32", 151936, 2048),
    ],
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # that kernels for few rows take
LINEAR_ROWS = (*ROWS, 256, 512, 1024, 2048, 4096, 8192)
MULTIPROCESSORS = 132  # of an H100 or H200
TARGET_PROGRAMS = 2 * MULTIPROCESSORS
MIN_ROWS_FOR_X_STAGES = 16  # with fewer a stage of x is small beside one of the weight
NORMED = 1024  # numbers of a row that a layer's neighbour norms
HALF_SHARED_BYTES, WHOLE_SHARED_BYTES = 114_000, 228_000  # two CTAs on a multiprocessor, or one


@dataclass(frozen=True)
class LinearCase:
    """One shape of one op ("linear", "linear_float32", "gated_linear") in bfloat16, without bias."""

    op: str
    sizes: tuple[int, int]
    num_rows: int

    @property
    def read_bytes(self) -> int:
        return 2 * self.sizes[0] * self.sizes[1]

    @property
    def baseline(self) -> Config:
        """What serves the op where no kernel of skinny_linear does."""
        return {"kernel": "unfused" if self.op == "gated_linear" else "cublas"}

    @property
    def keeps_twin(self) -> bool:
        return True

    def candidates(self) -> list[Config]:
        """The configs to compare with the baseline, each also with an early start where the GPU has it."""
        num_outputs, num_inputs = self.sizes
        configs: list[Config] = []
        if self.num_rows <= 4 and num_inputs <= MAX_GEMV_INPUTS:
            configs += _gemv_configs(num_inputs)
        if 1 < self.num_rows <= MAX_SKINNY_ROWS:
            configs += skinny_configs(num_outputs, num_inputs, self.num_rows, gated=self.op == "gated_linear")
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        if capability >= (9, 0):
            configs += [{**config, "early_start": True} for config in configs]
        if capability == (9, 0) and 1 < self.num_rows <= MAX_STREAMING_ROWS:
            configs += streaming_configs(num_outputs, num_inputs, self.num_rows, gated=self.op == "gated_linear")
        if capability == (9, 0) and self.num_rows > MAX_STREAMING_ROWS and self.op != "linear_float32":
            configs += TALL_CONFIGS
        return configs

    def calls(self, config: Config | None, *, num_weights: int | None = None) -> list[Callable[[], torch.Tensor]]:
        """Calls on `num_weights` weights in turn (by default as many as leave L2); with no config the op chooses."""
        generator = torch.Generator("cuda").manual_seed(0)
        num_outputs, num_inputs = self.sizes
        x_MK = torch.randn(self.num_rows, num_inputs, device="cuda", generator=generator).bfloat16()
        copies = num_weights or num_copies(self.read_bytes)
        weights = torch.empty(copies, num_outputs, num_inputs, device="cuda", dtype=torch.bfloat16)
        weights.normal_(0, num_inputs**-0.5, generator=generator)
        times = 1 if num_weights else num_calls(self.read_bytes)
        return [partial(self._run, config, x_MK, weights[i % copies]) for i in range(times)]

    def neighbour(self) -> Callable[[], object]:
        """A norm: one or attention, which starts and ends like it, stands on both sides of nearly every layer."""
        x_MK = torch.randn(self.num_rows, NORMED, device="cuda").bfloat16()
        return partial(rms_norm, x_MK, torch.ones(NORMED, device="cuda").bfloat16(), 1e-6, residual_TH=x_MK)

    def _run(self, config: Config | None, x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        out_dtype = torch.float32 if self.op == "linear_float32" else x_MK.dtype
        activation = "silu" if self.op == "gated_linear" else None
        if config is None:
            if activation:
                return gated_linear(x_MK, weight_NK, activation=activation)
            return linear(x_MK, weight_NK, out_dtype=out_dtype)
        if config["kernel"] in ("gemv", "skinny", "streaming", "tall"):
            return skinny_linear(x_MK, weight_NK, None, config, out_dtype=out_dtype, activation=activation)
        y_MN = cublas_linear(x_MK, weight_NK, None, out_dtype=out_dtype)
        return gated_activation(y_MN, activation) if activation else y_MN


def linear_cases(
    shapes: Iterable[str], sizes: Iterable[tuple[int, int]], rows: Iterable[int], *, num_ranks: int = 1
) -> list[LinearCase]:
    """Every op and size of the named models on one of `num_ranks` ranks, and plain layers of `sizes` (N, K), for each number
    of rows; none twice. ValueError where the ranks do not share a layer evenly.
    """
    layers = [layer.on_rank(num_ranks) for name in shapes for layer in SHAPES[name]]
    layers += [Layer("linear", *size) for size in sizes]
    distinct = dict.fromkeys((layer.op, layer.num_outputs, layer.num_inputs) for layer in layers)
    return [LinearCase(op, (n, k), num_rows) for op, n, k in distinct for num_rows in rows]


def _gemv_configs(num_inputs: int) -> Iterable[Config]:
    """Tiles of 8 (16 bytes) to 32 weights a thread; one row for a program where rows are long."""
    block_k = triton.next_power_of_2(num_inputs)
    for block_n in (1, 2, 4):
        for num_warps in (4, 8, 16):
            weights_a_thread = block_n * block_k // (32 * num_warps)
            if 8 <= weights_a_thread <= 32 or (block_n == 1 and weights_a_thread > 32 and num_warps > 4):
                yield {"kernel": "gemv", "block_n": block_n, "num_warps": num_warps}


def skinny_configs(num_outputs: int, num_inputs: int, num_rows: int, *, gated: bool) -> Iterable[Config]:
    """A few tiles, each with K whole and, if that leaves multiprocessors without work, split."""
    programs_outputs = num_outputs // 2 if gated else num_outputs
    tiles = [(16, 256, 4), (32, 128, 4), (64, 128, 4)] if num_rows <= 16 else [(32, 128, 4), (64, 128, 3), (128, 64, 4)]
    for block_n, block_k, num_stages in tiles:
        programs = triton.cdiv(programs_outputs, block_n)
        fill = min(triton.next_power_of_2(max(TARGET_PROGRAMS // programs, 1)), 8, max(num_inputs // (2 * block_k), 1))
        for split_k in dict.fromkeys((1, fill)):
            yield {
                "kernel": "skinny",
                "block_n": block_n,
                "block_k": block_k,
                "split_k": split_k,
                "num_warps": 4,
                "num_stages": num_stages - 1 if gated and block_n > 32 else num_stages,
            }


def streaming_configs(num_outputs: int, num_inputs: int, num_rows: int, *, gated: bool) -> list[Config]:
    """Tiles and splits whose CTAs fill the multiprocessors once or twice; of many tiles, tiles of three sizes.

    What counts is the bytes in flight, less whether every multiprocessor has as many: two CTAs of half the shared memory, or
    one and room for the next kernel to start early in, or one with all of it. Where x has many rows, also few stages of it and
    more of the weight. num_outputs: rows of the weight.
    """
    if triton.cdiv(num_outputs, TILES[-1]) > TARGET_PROGRAMS:
        chosen = [(tile_n, 1, HALF_SHARED_BYTES) for tile_n in (64, 128, 256)] + [(128, 1, 2 * HALF_SHARED_BYTES // 3)]
    else:
        splits = [split for split in (1, 2, 3, 4, 6, 8) if split == 1 or split * 2 * STEP_INPUTS <= num_inputs]
        choices = [(triton.cdiv(num_outputs, tile_n) * split, tile_n, split) for tile_n in TILES for split in splits]
        once = _fullest(choices, MULTIPROCESSORS, 0.85)
        twice = [choice for choice in _fullest(choices, TARGET_PROGRAMS, 0.7) if choice not in once[:3]]
        chosen = [(*choice, HALF_SHARED_BYTES) for choice in once[:3] + twice[:2]] + [(*once[0], WHOLE_SHARED_BYTES)]
    configs = [streaming_config(*choice, None, num_inputs, num_rows, gated=gated) for choice in chosen]
    if num_rows >= MIN_ROWS_FOR_X_STAGES:
        tiles = dict.fromkeys([(tile_n, split_k) for tile_n, split_k, _ in chosen] + [(TILES[0], 1)])  # nothing to exchange
        deep = [(*tile, WHOLE_SHARED_BYTES, x_stages) for tile in tiles for x_stages in (3, 5)]
        configs += [streaming_config(*choice, num_inputs, num_rows, gated=gated) for choice in deep]
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


def streaming_config(
    tile_n: int, split_k: int, shared_bytes: int, x_stages: int | None, num_inputs: int, num_rows: int, *, gated: bool
) -> Config:
    """With as many stages as `shared_bytes` hold, but no more than there are steps."""
    most_steps = max(triton.cdiv(triton.cdiv(num_inputs, STEP_INPUTS), split_k), 2)
    num_stages = stages_within(shared_bytes, tile_n, split_k, num_rows, gated=gated, x_stages=x_stages)
    config = {"kernel": "streaming", "tile_n": tile_n, "split_k": split_k, "num_stages": min(num_stages, most_steps)}
    return config | ({} if x_stages is None else {"x_stages": min(x_stages, most_steps)}) | {"early_start": True}


def _fullest(choices: list[tuple[int, int, int]], places: int, share: float) -> list[tuple[int, int]]:
    """(tile_n, split_k) of (number of CTAs, tile_n, split_k), the less split first: those with `share` of the most CTAs."""
    fitting = [choice for choice in choices if choice[0] <= places] or [min(choices)]
    enough = share * max(choice[0] for choice in fitting)
    return [choice[1:] for choice in sorted(fitting, key=lambda choice: choice[2]) if choice[0] >= enough]
