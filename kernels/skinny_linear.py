"""Kernels of linear layers for few rows, where reading the weight is all that costs: y = x @ weight.T + bias.

`gemv` (a few rows): a program loads whole rows of the weight into registers, every load in flight before the first use, and
multiplies them by each row of x. `skinny` (to 128 rows): a program owns BLOCK_N rows of the weight and streams them through
tensor cores, with the weight on the M side of the product, so that tiles are full however few rows x has; where the outputs
are too few to fill the GPU, programs share K, and the one that comes last (arrivals.py) adds their parts in a fixed order.

Either can apply a gated activation to its result: it then reads the rows n and n + F of the weight for output n, and rounds
both to the dtype of x before the activation, as `gated_activation` gets them. Sums are float32, one rounding. For one config
the same inputs give the same bits; a row's gemv sums do not depend on the rows beside it. Other configs sum in another order.

M rows, K inputs, N outputs, F = N / 2 outputs after a gated activation. A config (kernels/tuning.py) is
    {"kernel": "gemv", "block_n", "num_warps"}                                        K up to MAX_GEMV_INPUTS
    {"kernel": "skinny", "block_n", "block_k", "split_k", "num_warps", "num_stages"}  M up to MAX_SKINNY_ROWS
and, on compute capability 9.0 or newer,
    "early_start": True  The kernel starts while the one before it in the stream ends (programmatic dependent launch): until
                         that has finished it touches nothing but the weight, which the kernel before must not write. gemv
                         loads it to registers, skinny brings the first of it to the L2 cache.
    "tma": True          skinny: the weight is copied by the tensor memory accelerator, where its rows are aligned to 16 bytes.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .arrivals import MAX_COUNTERS, arrival_counters
from .gated_activation import activate
from .gemv_linear import MAX_GEMV_INPUTS, launch_gemv
from .tuning import Config

MAX_SKINNY_ROWS = 128
PREFETCH_BYTES = 65536  # of the weight, for a program that starts early: what two programs keep in flight on a multiprocessor


def skinny_linear(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    config: Config,
    *,
    out_dtype: torch.dtype,
    activation: str | None = None,
) -> torch.Tensor:
    """y [M, N] of `out_dtype`, or [M, N / 2] with an `activation`, on CUDA. The last dimension of x is contiguous."""
    num_rows, num_outputs = x_MK.shape[0], weight_NK.shape[0]
    y = torch.empty(num_rows, num_outputs // (1 if activation is None else 2), dtype=out_dtype, device=x_MK.device)
    if y.numel() > 0:
        launch = launch_gemv if config["kernel"] == "gemv" else _launch_skinny
        launch(x_MK, weight_NK, bias_N, y, activation or "", config)
    return y


def fits(config: Config, num_rows: int, num_inputs: int) -> bool:
    """Whether `config` is of a kernel of this file, and these sizes are within its limits."""
    if config["kernel"] == "gemv":
        return 0 < num_inputs <= MAX_GEMV_INPUTS
    return config["kernel"] == "skinny" and num_rows <= MAX_SKINNY_ROWS


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_kernel(
    x,
    weight,
    weight_tiles,
    bias,
    y,
    parts,
    arrivals,
    num_rows,
    num_outputs,
    stride_x,
    stride_w,
    NUM_INPUTS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    PREFETCH_INPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program BLOCK_N outputs of every row over SPLIT_INPUTS of the inputs; with `weight_tiles` it reads the weight there.

    If those are not all of the inputs, float32 parts [block of outputs, gate or up, split, BLOCK_N, BLOCK_M] are added by the
    program that is last to store one.
    """
    NUM_SPLITS: tl.constexpr = (NUM_INPUTS + SPLIT_INPUTS - 1) // SPLIT_INPUTS
    block, split = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    first = split * SPLIT_INPUTS
    k = first + tl.arange(0, BLOCK_K)
    inside_N, inside_M = n < num_outputs, m < num_rows
    if EARLY_START:
        nearest_N = tl.minimum(n, num_outputs - 1).to(tl.int64)
        _prefetch(weight + nearest_N * stride_w, first, NUM_INPUTS, PREFETCH_INPUTS, BLOCK_K)
        if ACTIVATION != "":
            _prefetch(weight + (nearest_N + num_outputs) * stride_w, first, NUM_INPUTS, PREFETCH_INPUTS, BLOCK_K)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    weight_NK = weight + n.to(tl.int64)[:, None] * stride_w + k[None, :]
    up_NK = weight + (n + num_outputs).to(tl.int64)[:, None] * stride_w + k[None, :]
    x_KM = x + m.to(tl.int64)[None, :] * stride_x + k[:, None]
    sum_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, SPLIT_INPUTS, BLOCK_K):
        inside_NK, inside_KM = inside_N[:, None], inside_M[None, :]
        if NUM_INPUTS % SPLIT_INPUTS != 0:
            inside_K = k + start < NUM_INPUTS
            inside_NK, inside_KM = inside_NK & inside_K[None, :], inside_KM & inside_K[:, None]
        x_tile = tl.load(x_KM + start, inside_KM, other=0.0)
        w_tile = _load_tile(weight_tiles, weight_NK + start, inside_NK, block * BLOCK_N, first + start)
        sum_NM = tl.dot(w_tile, x_tile, sum_NM, input_precision="ieee")
        if ACTIVATION != "":
            up_tile = _load_tile(weight_tiles, up_NK + start, inside_NK, num_outputs + block * BLOCK_N, first + start)
            up_NM = tl.dot(up_tile, x_tile, up_NM, input_precision="ieee")

    if NUM_SPLITS == 1:
        _finish(sum_NM, up_NM, x, bias, y, n, m, num_rows, num_outputs, ACTIVATION, HAS_BIAS)
    else:
        TILES: tl.constexpr = NUM_SPLITS if ACTIVATION == "" else 2 * NUM_SPLITS
        own = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        part_NM = parts + block.to(tl.int64) * (TILES * BLOCK_N * BLOCK_M) + own
        inside_NM = inside_N[:, None] & inside_M[None, :]
        if _store_part(sum_NM, up_NM, part_NM, arrivals + block, inside_NM, split, NUM_SPLITS, ACTIVATION):
            sum_NM = _add_parts(part_NM, inside_NM, NUM_SPLITS)
            if ACTIVATION != "":
                up_NM = _add_parts(part_NM + NUM_SPLITS * BLOCK_N * BLOCK_M, inside_NM, NUM_SPLITS)
            _finish(sum_NM, up_NM, x, bias, y, n, m, num_rows, num_outputs, ACTIVATION, HAS_BIAS)


@triton.jit
def _store_part(sum_NM, up_NM, part_NM, arrival, inside_NM, split, NUM_SPLITS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Stores one split's parts; whether it was the last to come, to which all parts are visible."""
    TILE: tl.constexpr = sum_NM.shape[0] * sum_NM.shape[1]
    tl.store(part_NM + split * TILE, sum_NM, inside_NM)
    if ACTIVATION != "":
        tl.store(part_NM + (NUM_SPLITS + split) * TILE, up_NM, inside_NM)
    tl.debug_barrier()
    is_last = tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == NUM_SPLITS - 1
    if is_last:
        tl.store(arrival, 0)
    return is_last


@triton.jit
def _add_parts(part_NM, inside_NM, NUM_SPLITS: tl.constexpr):
    """The sum in the order of the splits. Other multiprocessors wrote the parts: a line of them in L1 would be stale."""
    TILE: tl.constexpr = part_NM.shape[0] * part_NM.shape[1]
    sum_NM = tl.zeros(part_NM.shape, tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        sum_NM += tl.load(part_NM + split * TILE, inside_NM, other=0.0, cache_modifier=".cg")
    return sum_NM


@triton.jit
def _load_tile(weight_tiles, weight_NK, inside_NK, row, column):
    """A tile of the weight. The tensor memory accelerator gives zeros for what is outside."""
    if weight_tiles is None:
        tile = tl.load(weight_NK, inside_NK, other=0.0, eviction_policy="evict_first")
    else:
        tile = weight_tiles.load([row, column])
    return tile


@triton.jit
def _prefetch(row_N, first, NUM_INPUTS: tl.constexpr, PREFETCH_INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Brings inputs `first` to `first + PREFETCH_INPUTS` of rows of 16-bit numbers to L2, a line of 128 bytes at a time."""
    lines = tl.arange(0, BLOCK_K // 64 if BLOCK_K > 64 else 1) * 64
    for start in range(0, PREFETCH_INPUTS, BLOCK_K):
        k = tl.minimum(first + start + lines, NUM_INPUTS - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [row_N[:, None] + k[None, :]], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _finish(sum_NM, up_NM, x, bias, y, n, m, num_rows, num_outputs, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Adds the bias, applies the activation and stores. x gives the dtype that gate and up are rounded to."""
    inside_N = n < num_outputs
    if HAS_BIAS:
        sum_NM += tl.load(bias + n, inside_N, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION != "":
        if HAS_BIAS:
            up_NM += tl.load(bias + num_outputs + n, inside_N, other=0.0).to(tl.float32)[:, None]
        dtype = x.dtype.element_ty
        sum_NM = activate(sum_NM.to(dtype).to(tl.float32), up_NM.to(dtype).to(tl.float32), ACTIVATION)
    y_NM = y + m.to(tl.int64)[None, :] * num_outputs + n[:, None]
    tl.store(y_NM, sum_NM.to(y.dtype.element_ty), inside_N[:, None] & (m < num_rows)[None, :])


def _launch_skinny(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, y: torch.Tensor, activation: str, config: Config
) -> None:
    (num_rows, num_outputs), (weight_rows, num_inputs) = y.shape, weight_NK.shape
    block_n, block_k, block_m = config["block_n"], config["block_k"], max(triton.next_power_of_2(num_rows), 16)
    num_blocks = triton.cdiv(num_outputs, block_n)
    split_inputs = triton.cdiv(triton.cdiv(num_inputs, config["split_k"]), block_k) * block_k
    num_splits = triton.cdiv(num_inputs, split_inputs)
    parts = arrivals = None
    if num_splits > 1:
        assert num_blocks <= MAX_COUNTERS
        part_numbers = (weight_rows // num_outputs) * block_n * block_m
        parts = torch.empty(num_blocks, num_splits, part_numbers, dtype=torch.float32, device=y.device)
        arrivals = arrival_counters(y.device)
    _skinny_kernel[(num_blocks, num_splits)](
        x_MK,
        weight_NK,
        TensorDescriptor.from_tensor(weight_NK, [block_n, block_k]) if config.get("tma") and _is_aligned(weight_NK) else None,
        bias_N,
        y,
        parts,
        arrivals,
        num_rows,
        num_outputs,
        x_MK.stride(0),
        weight_NK.stride(0),
        NUM_INPUTS=num_inputs,
        SPLIT_INPUTS=split_inputs,
        PREFETCH_INPUTS=min(split_inputs, PREFETCH_BYTES // (2 * block_n * (weight_rows // num_outputs))),
        ACTIVATION=activation,
        HAS_BIAS=bias_N is not None,
        EARLY_START=config.get("early_start", False),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **({"launch_pdl": True} if config.get("early_start") else {}),
    )


def _is_aligned(weight_NK: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as the tensor memory accelerator needs it."""
    return weight_NK.data_ptr() % 16 == 0 and weight_NK.stride(0) * weight_NK.element_size() % 16 == 0
