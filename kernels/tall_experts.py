"""Products of experts with many pairs each, at the rate of the tensor cores: the launcher of cuda/tall_experts.cu.

It is the twin of grouped_gemm.py for prefill, in 16 bits, on compute capability 9.0: same arguments, same results; its
reference is that of streaming_experts.py. A CTA on every multiprocessor goes through items (256 rows of the weight of one
expert, by up to `most_pairs` of its pairs) with its copies ahead of its arithmetic, `num_stages` steps of 64 inputs deep.

T tokens, C choices a token, P = T * C pairs, E experts, H hidden, F intermediate, K inputs and N outputs of a product.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch

from .cuda import loader
from .gated_activation import ACTIVATIONS
from .streaming_experts import STEP_INPUTS, unfit_weight, with_aligned_rows

SOURCE = "tall_experts"
TILE = 256  # rows of the weight an item; gated: half of them gates, half ups
ROWS_TOGETHER = 8  # of the gate, then of up, in a stage
MOST_PAIRS, MAX_STAGES, MAX_EXPERTS = 192, 8, 256
NUM_THREADS = 384
_MAX_SHARED_BYTES = loader.CTA_SHARED_BYTES - 10 * 1024  # dynamic ones: items and their pairs have static ones


@dataclass(frozen=True, kw_only=True)
class TallConfig:
    """At most `most_pairs` pairs an item (a multiple of 16); an expert's are shared out evenly among the fewest items."""

    most_pairs: int
    num_stages: int


# Worth measuring: as many pairs as accumulators hold, or fewer and more even shares.
TALL_CONFIGS = (
    TallConfig(most_pairs=192, num_stages=3),
    TallConfig(most_pairs=160, num_stages=3),
    TallConfig(most_pairs=128, num_stages=3),
    TallConfig(most_pairs=96, num_stages=4),
)


def tall_experts(
    x_RK: torch.Tensor,
    weight_EUK: torch.Tensor,
    scales: torch.Tensor | None,
    y_PN: torch.Tensor,
    pairs_P: torch.Tensor,
    expert_starts: torch.Tensor,
    *,
    activation: str | None,
    config: TallConfig,
    sorted_rows: bool,
) -> None:
    """Writes y of each pair of an expert. Gated where `activation` is named (U = 2 N), else scaled by pair (U = N).

    Row pair // (P / R) of x belongs to a pair. With `sorted_rows` y of the gated product, and x of the other, have their rows
    in the order of `pairs`. It waits for the kernel before it lets the next start. ValueError where `unfit_reason` has one.
    """
    reason = unfit_reason(config, weight_EUK, x_RK.dtype, gated=activation is not None)
    if reason is not None:
        raise ValueError(f"tall_experts: {reason}")
    x_RK = with_aligned_rows(x_RK)
    num_experts, num_inputs, num_outputs = weight_EUK.shape[0], weight_EUK.shape[2], y_PN.shape[1]
    kernel = _load(config, weight_EUK, activation, in_order=activation is None and sorted_rows)
    assert kernel is not None  # unfit_reason has loaded its like
    x_box = (32 if config.most_pairs % 32 == 0 else 16, STEP_INPUTS)
    loader.launch(
        kernel,
        (
            weight_map(weight_EUK, gated=activation is not None),
            loader.tensor_map(x_RK.data_ptr(), x_RK.dtype, (x_RK.shape[0], num_inputs), x_RK.stride(0), x_box),
            ctypes.c_void_p(x_RK.data_ptr()),
            ctypes.c_void_p(None if scales is None else scales.data_ptr()),
            ctypes.c_void_p(y_PN.data_ptr()),
            ctypes.c_void_p(pairs_P.data_ptr()),
            ctypes.c_void_p(expert_starts.data_ptr()),
            ctypes.c_int(x_RK.stride(0)),
            ctypes.c_int(num_inputs),
            ctypes.c_int(num_outputs),
            ctypes.c_int(num_experts),
            ctypes.c_int(y_PN.shape[0] // x_RK.shape[0]),
            ctypes.c_int(sorted_rows),
        ),
        grid=(num_multiprocessors(x_RK.device), 1),
        num_threads=NUM_THREADS,
        shared_bytes=shared_bytes(config),
        early_start=True,
    )


def shared_bytes(config: TallConfig) -> int:
    """Dynamic shared memory of a CTA: its stages, and 64 outputs of each pair for both warpgroups."""
    stage = (TILE + config.most_pairs) * STEP_INPUTS * 2
    return 1024 + config.num_stages * stage + 2 * config.most_pairs * 64 * 2


def serves(config: TallConfig, weight_EUK: torch.Tensor, dtype: torch.dtype, *, gated: bool) -> bool:
    """Whether the kernel can run; where not, the reason has been logged once. Compiles at the first call."""
    return loader.is_served(SOURCE, unfit_reason(config, weight_EUK, dtype, gated=gated), instead="another kernel does")


def unfit_reason(config: TallConfig, weight_EUK: torch.Tensor, dtype: torch.dtype, *, gated: bool) -> str | None:
    """Why the kernel cannot run with this config on this weight and x of this dtype, or None. Compiles at the first call."""
    reason = _unfit_config(config) or unfit_weight(weight_EUK, dtype, gated=gated, max_experts=MAX_EXPERTS, multiple_of=8)
    if reason is not None:
        return reason
    is_loaded = _load(config, weight_EUK, ACTIVATIONS[0] if gated else None, in_order=not gated) is not None
    return None if is_loaded else f"it cannot be compiled: {loader.unavailable_reason()}"


@cache
def _unfit_config(config: TallConfig) -> str | None:
    if config.most_pairs not in range(16, MOST_PAIRS + 1, 16) or not 2 <= config.num_stages <= MAX_STAGES:
        return f"{config} is not of 16 to {MOST_PAIRS} pairs, by 16, and 2 to {MAX_STAGES} stages"
    if shared_bytes(config) > _MAX_SHARED_BYTES:
        return f"{config} needs {shared_bytes(config)} bytes of shared memory, there are {_MAX_SHARED_BYTES}"
    return None


def _load(config: TallConfig, weight_EUK: torch.Tensor, activation: str | None, *, in_order: bool) -> loader.Kernel | None:
    macros = (
        ("PAIRS", config.most_pairs),
        ("STAGES", config.num_stages),
        ("IN_ORDER", int(in_order)),
        ("GATED", int(activation is not None)),
        ("ACTIVATION", 0 if activation is None else ACTIVATIONS.index(activation)),
        ("FLOAT16", int(weight_EUK.dtype == torch.float16)),
    )
    return loader.load(SOURCE, macros, weight_EUK.device.index)


def weight_map(weight_EUK: torch.Tensor, *, gated: bool) -> loader.TensorMap:
    """[expert, group of 8 outputs, gate or up, row of the group, input], in boxes of TILE rows; ungated the groups are one."""
    num_experts, rows, inputs = weight_EUK.shape
    if gated:
        shape = (num_experts, rows // 2 // ROWS_TOGETHER, 2, ROWS_TOGETHER, inputs)
        strides = (rows * inputs, ROWS_TOGETHER * inputs, rows // 2 * inputs, inputs)
        box = (1, TILE // 2 // ROWS_TOGETHER, 2, ROWS_TOGETHER, STEP_INPUTS)
    else:
        shape, strides = (num_experts, 1, 1, rows, inputs), (rows * inputs, rows * inputs, rows * inputs, inputs)
        box = (1, 1, 1, TILE, STEP_INPUTS)
    return loader.tensor_map_of(weight_EUK.data_ptr(), weight_EUK.dtype, shape, strides, box)


@cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
