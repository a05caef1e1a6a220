"""Products of experts with the pairs sorted to them, at the rate of memory: the launcher of cuda/streaming_experts.cu.

It is the twin of grouped_gemm.py for few pairs an expert, in 16 bits, on compute capability 9.0: same arguments, same results.
Each of `programs` CTAs goes through items (`tile` rows of the weight of one expert that has pairs) with its copies ahead of
its arithmetic, `num_stages` steps of 64 inputs deep; `rows` pairs share one pass over an expert's weight.

T tokens, C choices a token, P = T * C pairs, E experts, H hidden, F intermediate, K inputs and N outputs of a product.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import pairwise

import torch
import triton

from .cuda import loader
from .gated_activation import ACTIVATIONS, gated_activation_ref

SOURCE = "streaming_experts"
ROWS, TILES = (8, 16, 32, 64), (64, 128, 256)
MAX_STAGES, MAX_EXPERTS = 32, 512
STEP_INPUTS = 64  # of a stage: 128 bytes of each row


@dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """`tile` rows of the weight an item (gated: half of them gates, half ups), `rows` pairs a pass, `programs` CTAs."""

    tile: int
    rows: int
    num_stages: int
    programs: int


class Routing(IntEnum):
    """When the kernel may read which experts have pairs; the numbers of streaming_experts.cu.

    AFTER_WAIT: when the kernel before has finished.
    BEFORE_WAIT: at once. The kernel before must be one that lets this one start after its own wait, as this kernel does.
    ASSUME_ALL: after the wait, but nearly all experts have some: the first item of each program is copied before.
    """

    AFTER_WAIT = 0
    BEFORE_WAIT = 1
    ASSUME_ALL = 2


def streaming_experts(
    x_RK: torch.Tensor,
    weight_EUK: torch.Tensor,
    scales: torch.Tensor | None,
    y_PN: torch.Tensor,
    pairs_P: torch.Tensor,
    expert_starts: torch.Tensor,
    *,
    activation: str | None,
    config: StreamingConfig,
    routing: Routing,
    sorted_rows: bool,
) -> None:
    """Writes y of each pair of an expert. Gated where `activation` is named (U = 2 N), else scaled by pair (U = N).

    Row pair // (P / R) of x belongs to a pair. With `sorted_rows` y of the gated product, and x of the other, have their rows
    in the order of `pairs`. ValueError where `unfit_reason` has one.
    """
    reason = unfit_reason(config, weight_EUK, x_RK.dtype, gated=activation is not None)
    if reason is not None:
        raise ValueError(f"streaming_experts: {reason}")
    x_RK = with_aligned_rows(x_RK)
    num_experts, weight_rows, num_inputs = weight_EUK.shape
    num_outputs = y_PN.shape[1]
    outputs = config.tile // (1 if activation is None else 2)
    tiles_an_expert = triton.cdiv(num_outputs, outputs)
    kernel = _load(config, weight_EUK, gated=activation is not None)
    assert kernel is not None  # unfit_reason has loaded it
    shape = (num_experts * weight_rows, num_inputs)
    loader.launch(
        kernel,
        (
            loader.tensor_map(weight_EUK.data_ptr(), weight_EUK.dtype, shape, weight_EUK.stride(1), (outputs, STEP_INPUTS)),
            ctypes.c_void_p(x_RK.data_ptr()),
            ctypes.c_void_p(None if scales is None else scales.data_ptr()),
            ctypes.c_void_p(y_PN.data_ptr()),
            ctypes.c_void_p(pairs_P.data_ptr()),
            ctypes.c_void_p(expert_starts.data_ptr()),
            ctypes.c_int(x_RK.stride(0)),
            ctypes.c_int(num_inputs),
            ctypes.c_int(num_outputs),
            ctypes.c_int(num_experts),
            ctypes.c_int(tiles_an_expert),
            ctypes.c_int(y_PN.shape[0] // x_RK.shape[0]),
            ctypes.c_int(config.num_stages),
            ctypes.c_int(ACTIVATIONS.index(activation) if activation else 0),
            ctypes.c_int(routing),
            ctypes.c_int(sorted_rows),
        ),
        grid=(min(config.programs, num_experts * tiles_an_expert), 1),
        num_threads=config.tile // 64 * 128 + 32,
        shared_bytes=shared_bytes(config),
        early_start=True,
    )


def streaming_experts_ref(
    x_RK: torch.Tensor,
    weight_EUK: torch.Tensor,
    scales: torch.Tensor | None,
    y_PN: torch.Tensor,
    pairs_P: torch.Tensor,
    expert_starts: torch.Tensor,
    *,
    activation: str | None,
    sorted_rows: bool,
) -> None:
    for expert, (first, end) in enumerate(pairwise(expert_starts.tolist())):
        pairs = pairs_P[first:end].long()
        places = torch.arange(first, end, device=pairs.device)
        rows = places if sorted_rows and activation is None else pairs // (y_PN.shape[0] // x_RK.shape[0])
        y = x_RK[rows].float() @ weight_EUK[expert].float().T
        if scales is not None:
            y *= scales.flatten()[pairs, None]
        if activation is not None:
            y = gated_activation_ref(y.to(y_PN.dtype), activation)
        y_PN[places if sorted_rows and activation is not None else pairs] = y.to(y_PN.dtype)


def shared_bytes(config: StreamingConfig) -> int:
    """Dynamic shared memory of a CTA: its stages, and the sums of a pass."""
    stage = (config.tile + config.rows) * STEP_INPUTS * 2
    return 1024 + config.num_stages * stage + config.rows * (config.tile + 4) * 4


def serves(config: StreamingConfig, weight_EUK: torch.Tensor, dtype: torch.dtype, *, gated: bool) -> bool:
    """Whether the kernel can run; where not, the reason has been logged once. Compiles at the first call."""
    return loader.is_served(SOURCE, unfit_reason(config, weight_EUK, dtype, gated=gated), instead="another kernel does")


def unfit_reason(config: StreamingConfig, weight_EUK: torch.Tensor, dtype: torch.dtype, *, gated: bool) -> str | None:
    """Why the kernel cannot run with this config on this weight and x of this dtype, or None. Compiles at the first call."""
    reason = _unfit_config(config) or unfit_weight(weight_EUK, dtype, gated=gated, max_experts=MAX_EXPERTS, multiple_of=4)
    if reason is not None:
        return reason
    is_loaded = _load(config, weight_EUK, gated=gated) is not None
    return None if is_loaded else f"it cannot be compiled: {loader.unavailable_reason()}"


def unfit_weight(
    weight_EUK: torch.Tensor, dtype: torch.dtype, *, gated: bool, max_experts: int, multiple_of: int
) -> str | None:
    """Why a CUDA C++ kernel of experts cannot read this weight with x of this dtype, or None. `multiple_of`: of the outputs."""
    num_experts, weight_rows, num_inputs = weight_EUK.shape
    if num_experts > max_experts or num_inputs % STEP_INPUTS or (weight_rows // (2 if gated else 1)) % multiple_of:
        shape = tuple(weight_EUK.shape)
        return f"weights {shape}: at most {max_experts} experts, inputs by {STEP_INPUTS}, outputs by {multiple_of}"
    if weight_EUK.dtype not in (torch.bfloat16, torch.float16) or dtype != weight_EUK.dtype:
        return f"x is {dtype}, the weight {weight_EUK.dtype}: both must be bfloat16 or both float16"
    if not weight_EUK.is_contiguous() or weight_EUK.data_ptr() % 16:
        return f"the weight (strides {weight_EUK.stride()}) must be contiguous and begin at a multiple of 16 bytes"
    return loader.misplaced_reason("the weight", weight_EUK.device)


def with_aligned_rows(x_RK: torch.Tensor) -> torch.Tensor:
    """x itself, or a copy whose rows begin at multiples of 16 bytes; its inputs are a multiple of 8."""
    is_aligned = x_RK.stride(0) % 8 == 0 and x_RK.data_ptr() % 16 == 0
    return x_RK if is_aligned else x_RK.clone(memory_format=torch.contiguous_format)


@cache
def _unfit_config(config: StreamingConfig) -> str | None:
    if config.tile not in TILES or config.rows not in ROWS or not 2 <= config.num_stages <= MAX_STAGES:
        return f"{config} is not of tiles {TILES}, rows {ROWS} and 2 to {MAX_STAGES} stages"
    if shared_bytes(config) > loader.MAX_SHARED_BYTES:
        return f"{config} needs {shared_bytes(config)} bytes of shared memory, there are {loader.MAX_SHARED_BYTES}"
    return None


def _load(config: StreamingConfig, weight_EUK: torch.Tensor, *, gated: bool) -> loader.Kernel | None:
    macros = (
        ("ROWS", config.rows),
        ("TILE", config.tile),
        ("GATED", int(gated)),
        ("FLOAT16", int(weight_EUK.dtype == torch.float16)),
    )
    return loader.load(SOURCE, macros, weight_EUK.device.index)
