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

import torch
import triton

from .cuda import loader
from .gated_activation import ACTIVATIONS

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

    Row pair // (P / R) of x belongs to a pair. With `sorted_rows` y of the gated product, and x of the other, have their rows in
    the order of `pairs`. ValueError where `unfit_reason` has one, or x is not aligned.
    """
    reason = unfit_reason(config, weight_EUK, gated=activation is not None)
    if reason is None and (x_RK.stride(0) % 8 or x_RK.data_ptr() % 16):
        reason = f"rows of x (stride {x_RK.stride(0)}) must lie apart by multiples of 16 bytes and begin at one"
    if reason is not None:
        raise ValueError(f"streaming_experts: {reason}")
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


def shared_bytes(config: StreamingConfig) -> int:
    """Dynamic shared memory of a CTA: its stages, and the sums of a pass."""
    stage = (config.tile + config.rows) * STEP_INPUTS * 2
    return 1024 + config.num_stages * stage + config.rows * (config.tile + 4) * 4


def unfit_reason(config: StreamingConfig, weight_EUK: torch.Tensor, *, gated: bool) -> str | None:
    """Why the kernel cannot run with this config on this weight, or None. Compiles at the first call."""
    num_experts, weight_rows, num_inputs = weight_EUK.shape
    if config.tile not in TILES or config.rows not in ROWS or not 2 <= config.num_stages <= MAX_STAGES:
        return f"{config} is not of tiles {TILES}, rows {ROWS} and 2 to {MAX_STAGES} stages"
    if shared_bytes(config) > loader.MAX_SHARED_BYTES:
        return f"{config} needs {shared_bytes(config)} bytes of shared memory, there are {loader.MAX_SHARED_BYTES}"
    if num_experts > MAX_EXPERTS or num_inputs % STEP_INPUTS or (weight_rows // (2 if gated else 1)) % 4:
        return f"weights {tuple(weight_EUK.shape)}: at most {MAX_EXPERTS} experts, inputs by {STEP_INPUTS}, outputs by 4"
    if weight_EUK.dtype not in (torch.bfloat16, torch.float16) or not weight_EUK.is_contiguous() or weight_EUK.data_ptr() % 16:
        return f"the weight must be contiguous bfloat16 or float16, not {weight_EUK.dtype} of strides {weight_EUK.stride()}"
    if weight_EUK.device.type != "cuda" or torch.cuda.get_device_capability(weight_EUK.device) != loader.CAPABILITY:
        return f"it is for compute capability {'.'.join(map(str, loader.CAPABILITY))}, the weight is on {weight_EUK.device}"
    if _load(config, weight_EUK, gated=gated) is None:
        return f"it cannot be compiled: {loader.unavailable_reason()}"
    return None


def _load(config: StreamingConfig, weight_EUK: torch.Tensor, *, gated: bool) -> loader.Kernel | None:
    macros = (
        ("ROWS", config.rows),
        ("TILE", config.tile),
        ("GATED", int(gated)),
        ("FLOAT16", int(weight_EUK.dtype == torch.float16)),
    )
    return loader.load(SOURCE, macros, weight_EUK.device.index)
