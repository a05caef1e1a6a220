"""Linear layer of one or a few rows without tensor cores: what skinny_linear.py launches for configs of the kernel "gemv".

A program loads whole rows of the weight into registers, every load in flight before the first use, and multiplies them by each
row of x. M rows, K inputs, N outputs.
"""

import torch
import triton
import triton.language as tl

from .gated_activation import activate
from .tuning import Config

MAX_GEMV_INPUTS = 32768  # a row of the weight, in the registers of at most 16 warps


def default_gemv_config(num_inputs: int) -> Config:
    """A tile of about 4096 weights: a long row, or some short ones; 16 weights for each thread, more where rows are long."""
    block_k = triton.next_power_of_2(num_inputs)
    block_n = max(4096 // block_k, 1)
    return {"kernel": "gemv", "block_n": min(block_n, 4), "num_warps": min(max(block_k // 512, 4), 16)}


@triton.jit(do_not_specialize_on_alignment=["num_rows"])
def _gemv_kernel(
    x,
    weight,
    bias,
    y,
    num_rows,
    num_outputs,
    stride_x,
    stride_w,
    NUM_INPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program BLOCK_N outputs of every row; BLOCK_K covers all inputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside_N, inside_K = n < num_outputs, k < NUM_INPUTS
    inside_NK = inside_N[:, None] & inside_K[None, :]
    weight_NK = weight + n.to(tl.int64)[:, None] * stride_w + k[None, :]
    w_NK = tl.load(weight_NK, inside_NK, other=0.0, eviction_policy="evict_first")
    if ACTIVATION != "":
        up_NK = weight + (n + num_outputs).to(tl.int64)[:, None] * stride_w + k[None, :]
        up_NK = tl.load(up_NK, inside_NK, other=0.0, eviction_policy="evict_first")
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for _ in range(num_rows):
        x_K = tl.load(x + k, inside_K, other=0.0)
        y_N = tl.sum(w_NK.to(tl.float32) * x_K.to(tl.float32)[None, :], axis=1)
        if HAS_BIAS:
            y_N += tl.load(bias + n, inside_N, other=0.0).to(tl.float32)
        if ACTIVATION != "":
            up_N = tl.sum(up_NK.to(tl.float32) * x_K.to(tl.float32)[None, :], axis=1)
            if HAS_BIAS:
                up_N += tl.load(bias + num_outputs + n, inside_N, other=0.0).to(tl.float32)
            y_N = activate(y_N.to(x_K.dtype).to(tl.float32), up_N.to(x_K.dtype).to(tl.float32), ACTIVATION)
        tl.store(y + n, y_N.to(y.dtype.element_ty), inside_N)
        x += stride_x
        y += num_outputs


def launch_gemv(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, y: torch.Tensor, activation: str, config: Config
) -> None:
    num_rows, num_outputs = y.shape
    _gemv_kernel[(triton.cdiv(num_outputs, config["block_n"]),)](
        x_MK,
        weight_NK,
        bias_N,
        y,
        num_rows,
        num_outputs,
        x_MK.stride(0),
        weight_NK.stride(0),
        NUM_INPUTS=weight_NK.shape[1],
        ACTIVATION=activation,
        HAS_BIAS=bias_N is not None,
        EARLY_START=config.get("early_start", False),
        BLOCK_N=config["block_n"],
        BLOCK_K=triton.next_power_of_2(weight_NK.shape[1]),
        num_warps=config["num_warps"],
        **({"launch_pdl": True} if config.get("early_start") else {}),
    )
