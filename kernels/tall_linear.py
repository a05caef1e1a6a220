"""Linear layers for many rows on compute capability 9.0, at the rate of the tensor cores: the launcher of cuda/tall_linear.cu.

It serves what cuBLAS otherwise does, with the same roundings: y = x @ weight.T + bias, plain or with a gated activation, so
that gate and up are never written. A CTA on every multiprocessor goes through items (256 rows of the weight by `rows` of x)
with its copies ahead of its arithmetic, `num_stages` steps of 64 inputs deep. Items go through `band` tiles of the weight for
all rows of x, then the next.

M rows, K inputs, N outputs (rows of the weight). A config (kernels/tuning.py) is
    {"kernel": "tall", "rows": 16..192, "num_stages", "band"}
"""

from __future__ import annotations

import ctypes

import torch

from .cuda import loader
from .gated_activation import ACTIVATIONS
from .streaming_experts import STEP_INPUTS, unfit_weight, with_aligned_rows
from .tall_experts import NUM_THREADS, TILE, num_multiprocessors, weight_map
from .tuning import Config

SOURCE = "tall_linear"
MAX_ROWS, MAX_STAGES = 192, 8
OUTPUTS_AT_ONCE = 64  # of a warpgroup, that are stored together
_MAX_SHARED_BYTES = loader.CTA_SHARED_BYTES - 1024  # dynamic ones: barriers are static

# Worth measuring: the largest items, which read the least, and smaller ones, of which the last round leaves fewer CTAs idle.
TALL_CONFIGS: tuple[Config, ...] = tuple(
    {"kernel": "tall", "rows": rows, "num_stages": num_stages, "band": 8}
    for rows, num_stages in ((192, 3), (176, 3), (160, 3), (128, 4), (112, 4), (96, 4), (64, 5))
)


def launch_tall(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, y: torch.Tensor, activation: str, config: Config
) -> None:
    """Writes y [M, N], or [M, N / 2] with an activation. ValueError where `unfit_reason` has one."""
    reason = unfit_reason(config, weight_NK, gated=bool(activation))
    if reason is None and y.dtype != weight_NK.dtype:
        reason = f"y is {y.dtype}, the kernel rounds it to the weight's {weight_NK.dtype}"
    if reason is not None:
        raise ValueError(f"tall_linear: {reason}")
    kernel = _load(config, weight_NK, activation)
    assert kernel is not None  # unfit_reason has loaded its like
    x_MK = with_aligned_rows(x_MK)
    num_rows, num_outputs = y.shape
    rows = config["rows"]
    loader.launch(
        kernel,
        (
            weight_map(weight_NK[None], gated=bool(activation)),
            loader.tensor_map(x_MK.data_ptr(), x_MK.dtype, tuple(x_MK.shape), x_MK.stride(0), (rows, STEP_INPUTS)),
            loader.tensor_map(y.data_ptr(), y.dtype, (num_rows, num_outputs), num_outputs, (rows, OUTPUTS_AT_ONCE)),
            ctypes.c_void_p(None if bias_N is None else bias_N.data_ptr()),
            ctypes.c_int(num_rows),
            ctypes.c_int(weight_NK.shape[1]),
            ctypes.c_int(num_outputs),
            ctypes.c_int(config["band"]),
        ),
        grid=(num_multiprocessors(x_MK.device), 1),
        num_threads=NUM_THREADS,
        shared_bytes=shared_bytes(config),
        early_start=True,
    )


def shared_bytes(config: Config) -> int:
    """Dynamic shared memory of a CTA: its stages, and the outputs of both warpgroups that are stored together."""
    stage = (TILE + config["rows"]) * STEP_INPUTS * 2
    return 1024 + config["num_stages"] * stage + 2 * config["rows"] * OUTPUTS_AT_ONCE * 2


def serves(config: Config, weight_NK: torch.Tensor, *, gated: bool) -> bool:
    """Whether the kernel can run; where not, the reason has been logged once. Compiles at the first call."""
    return loader.is_served(SOURCE, unfit_reason(config, weight_NK, gated=gated), instead="cuBLAS does")


def unfit_reason(config: Config, weight_NK: torch.Tensor, *, gated: bool) -> str | None:
    """Why the kernel cannot run with this config on this weight, or None. Compiles at the first call."""
    reason = _unfit_config(config) or unfit_weight(weight_NK[None], weight_NK.dtype, gated=gated, max_experts=1, multiple_of=8)
    if reason is not None:
        return reason
    is_loaded = _load(config, weight_NK, ACTIVATIONS[0] if gated else "") is not None
    return None if is_loaded else f"it cannot be compiled: {loader.unavailable_reason()}"


def _unfit_config(config: Config) -> str | None:
    rows, num_stages = config["rows"], config["num_stages"]
    limits = (
        (rows in range(16, MAX_ROWS + 1, 16), f"rows {rows} is not 16 to {MAX_ROWS}, by 16"),
        (2 <= num_stages <= MAX_STAGES, f"num_stages {num_stages} is not 2 to {MAX_STAGES}"),
        (config["band"] >= 1, f"band {config['band']} is less than one tile"),
    )
    for is_kept, reason in limits:
        if not is_kept:
            return reason
    if shared_bytes(config) > _MAX_SHARED_BYTES:
        return f"{config} needs {shared_bytes(config)} bytes of shared memory, there are {_MAX_SHARED_BYTES}"
    return None


def _load(config: Config, weight_NK: torch.Tensor, activation: str) -> loader.Kernel | None:
    macros = (
        ("ROWS", config["rows"]),
        ("STAGES", config["num_stages"]),
        ("GATED", int(bool(activation))),
        ("ACTIVATION", ACTIVATIONS.index(activation) if activation else 0),
        ("FLOAT16", int(weight_NK.dtype == torch.float16)),
    )
    return loader.load(SOURCE, macros, weight_NK.device.index)
