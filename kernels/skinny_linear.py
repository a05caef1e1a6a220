"""Kernels of linear layers for few rows, where reading the weight is all that costs: y = x @ weight.T + bias.

`gemv` (a few rows): a program loads whole rows of the weight into registers, every load in flight before the first use, and
multiplies them by each row of x. `skinny` (to 64 rows): a program owns BLOCK_N rows of the weight and streams them through
tensor cores, with the weight on the M side of the product, so that tiles are full however few rows x has; where the outputs
are too few to fill the GPU, programs share K and a second kernel adds their parts in a fixed order.

Either can apply a gated activation to its result: it then reads the rows n and n + F of the weight for output n, and rounds
both to the dtype of x before the activation, as `gated_activation` gets them. Sums are float32, one rounding. For one config
the same inputs give the same bits; a row's gemv sums do not depend on the rows beside it. Other configs sum in another order.

M rows, K inputs, N outputs, F = N / 2 outputs after a gated activation. A config (kernels/tuning.py) is
    {"kernel": "gemv", "block_n", "num_warps"}                                        K up to MAX_GEMV_INPUTS
    {"kernel": "skinny", "block_n", "block_k", "split_k", "num_warps", "num_stages"}  M up to MAX_SKINNY_ROWS
or one of streaming_linear.py or tall_linear.py, CUDA C++ kernels for compute capability 9.0, which are launched from here too;
and with "block_m" a skinny kernel takes so many rows at a time, however many there are (`invariant_config`),
and with "early_start": True (compute capability 9.0 or newer) the kernel starts while the one before it in the stream ends:
it touches nothing but the weight, which the kernel before must not write, until that has finished (programmatic dependent
launch).
"""

import torch
import triton
import triton.language as tl

from .gated_activation import activate
from .race import HeadScores, RaceRows, race_tensors, race_tile
from .streaming_linear import launch_race, launch_streaming, unfit_sizes
from .tall_linear import launch_tall
from .tuning import Config

MAX_SKINNY_ROWS = 64
MAX_GEMV_INPUTS = 32768  # a row of the weight, in the registers of at most 16 warps


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
        launchers = {"gemv": _launch_gemv, "skinny": _launch_skinny, "streaming": launch_streaming, "tall": launch_tall}
        launch, at_once = launchers[config["kernel"]], config.get("block_m", num_rows)
        for x_rows, y_rows in zip(x_MK.split(at_once), y.split(at_once), strict=True):
            launch(x_rows, weight_NK, bias_N, y_rows, activation or "", config)
    return y


def skinny_race(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, rows: RaceRows, scores: HeadScores, config: Config, *, first_token: int
) -> None:
    """Fills the scores, as head_race.py says, of at least one row. The config `fits_race`."""
    if config["kernel"] == "streaming":
        launch_race(x_MK, weight_NK, rows, scores, config, first_token=first_token)
    else:
        _launch_skinny(x_MK, weight_NK, None, scores.logits_SV, "", config, race=(rows, scores, first_token))


def fits_race(config: Config, num_rows: int, num_inputs: int) -> bool:
    """Whether `skinny_race` takes the kernel of `config`, and these sizes are within its limits."""
    if config["kernel"] == "streaming":
        return unfit_sizes(config, num_rows, num_inputs, race=True) is None
    return config["kernel"] == "skinny" and num_rows <= MAX_SKINNY_ROWS and config["split_k"] == 1


def invariant_config(element_size: int) -> Config:
    """For any number of rows, each of whose bits depend on that row and the weight alone: tiles of one size, filled up."""
    return {
        "kernel": "skinny",
        "block_m": 64,
        "block_n": 64,
        "block_k": 256 // element_size,
        "split_k": 1,
        "num_warps": 4,
        "num_stages": 3,
    }


def fits(config: Config, num_rows: int, num_inputs: int) -> bool:
    """Whether `skinny_linear` takes the kernel of `config`, and these sizes are within its limits."""
    if config["kernel"] == "gemv":
        return 0 < num_inputs <= MAX_GEMV_INPUTS
    if config["kernel"] == "streaming":
        return unfit_sizes(config, num_rows, num_inputs) is None
    return config["kernel"] == "skinny" and num_rows <= MAX_SKINNY_ROWS


def default_gemv_config(num_inputs: int) -> Config:
    """A tile of about 4096 weights: a long row, or some short ones; 16 weights for each thread, more where rows are long."""
    block_k = triton.next_power_of_2(num_inputs)
    block_n = max(4096 // block_k, 1)
    return {"kernel": "gemv", "block_n": min(block_n, 4), "num_warps": min(max(block_k // 512, 4), 16)}


def _launch_options(config: Config) -> dict[str, bool]:
    return {"launch_pdl": True} if config.get("early_start") else {}


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


def _launch_gemv(
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
        **_launch_options(config),
    )


_RACE = ["slots", "positions", "wants_logits", "temperatures", "seeds", "scores", "tokens", "logits"]


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_RACE)
def _skinny_kernel(
    x,
    weight,
    bias,
    y,
    parts,
    num_rows,
    num_outputs,
    stride_x,
    stride_w,
    slots,
    positions,
    wants_logits,
    temperatures,
    seeds,
    scores,
    tokens,
    logits,
    first_token,
    NUM_INPUTS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program BLOCK_N outputs of every row over SPLIT_INPUTS of the inputs.

    If those are not all of them it writes float32 parts [splits, rows, rows of the weight], without bias. With slots it races.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * SPLIT_INPUTS
    k = first + tl.arange(0, BLOCK_K)
    inside_N, inside_M = n < num_outputs, m < num_rows
    weight_NK = weight + n.to(tl.int64)[:, None] * stride_w + k[None, :]
    x_KM = x + m.to(tl.int64)[None, :] * stride_x + k[:, None]
    sum_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_NK = weight + (n + num_outputs).to(tl.int64)[:, None] * stride_w + k[None, :]
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in range(0, SPLIT_INPUTS, BLOCK_K):
        inside_NK, inside_KM = inside_N[:, None], inside_M[None, :]
        if NUM_INPUTS % SPLIT_INPUTS != 0:
            inside_K = k + start < NUM_INPUTS
            inside_NK, inside_KM = inside_NK & inside_K[None, :], inside_KM & inside_K[:, None]
        x_tile = tl.load(x_KM + start, inside_KM, other=0.0)
        w_tile = tl.load(weight_NK + start, inside_NK, other=0.0, eviction_policy="evict_first")
        sum_NM = tl.dot(w_tile, x_tile, sum_NM, input_precision="ieee")
        if ACTIVATION != "":
            up_tile = tl.load(up_NK + start, inside_NK, other=0.0, eviction_policy="evict_first")
            up_NM = tl.dot(up_tile, x_tile, up_NM, input_precision="ieee")

    inside_NM = inside_N[:, None] & inside_M[None, :]
    if slots is not None:
        race_tile(
            sum_NM,
            tl.program_id(0) * BLOCK_N,
            num_rows,
            num_outputs,
            y,
            slots,
            positions,
            wants_logits,
            temperatures,
            seeds,
            scores,
            tokens,
            logits,
            first_token,
        )
    elif SPLIT_INPUTS < NUM_INPUTS:
        row_len = num_outputs * 2 if ACTIVATION != "" else num_outputs
        part_NM = parts + (tl.program_id(1) * num_rows + m)[None, :] * row_len + n[:, None]
        tl.store(part_NM, sum_NM, inside_NM)
        if ACTIVATION != "":
            tl.store(part_NM + num_outputs, up_NM, inside_NM)
    else:
        if HAS_BIAS:
            sum_NM += tl.load(bias + n, inside_N, other=0.0).to(tl.float32)[:, None]
        if ACTIVATION != "":
            if HAS_BIAS:
                up_NM += tl.load(bias + num_outputs + n, inside_N, other=0.0).to(tl.float32)[:, None]
            dtype = x.dtype.element_ty
            sum_NM = activate(sum_NM.to(dtype).to(tl.float32), up_NM.to(dtype).to(tl.float32), ACTIVATION)
        tl.store(y + m.to(tl.int64)[None, :] * num_outputs + n[:, None], sum_NM.to(y.dtype.element_ty), inside_NM)


@triton.jit(do_not_specialize=["num_rows"])
def _add_parts_kernel(
    x,
    parts,
    bias,
    y,
    num_rows,
    num_outputs,
    NUM_SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and a block of outputs: the sum over splits in their order, bias, activation. x gives its dtype."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < num_outputs
    row_len = num_outputs * 2 if ACTIVATION != "" else num_outputs
    y_N = tl.zeros([BLOCK], tl.float32)
    up_N = tl.zeros([BLOCK], tl.float32)
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for split in tl.static_range(NUM_SPLITS):
        part = parts + (split * num_rows + row) * row_len + n
        y_N += tl.load(part, inside, other=0.0)
        if ACTIVATION != "":
            up_N += tl.load(part + num_outputs, inside, other=0.0)
    if HAS_BIAS:
        y_N += tl.load(bias + n, inside, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        if HAS_BIAS:
            up_N += tl.load(bias + num_outputs + n, inside, other=0.0).to(tl.float32)
        dtype = x.dtype.element_ty
        y_N = activate(y_N.to(dtype).to(tl.float32), up_N.to(dtype).to(tl.float32), ACTIVATION)
    tl.store(y + row.to(tl.int64) * num_outputs + n, y_N.to(y.dtype.element_ty), inside)


def _launch_skinny(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    y: torch.Tensor,
    activation: str,
    config: Config,
    race: tuple[RaceRows, HeadScores, int] | None = None,
) -> None:
    (num_rows, num_outputs), num_inputs = y.shape, weight_NK.shape[1]
    split_inputs = triton.cdiv(triton.cdiv(num_inputs, config["split_k"]), config["block_k"]) * config["block_k"]
    num_splits = triton.cdiv(num_inputs, split_inputs)
    parts = None
    if num_splits > 1:
        parts = torch.empty(num_splits, num_rows, weight_NK.shape[0], dtype=torch.float32, device=y.device)
    _skinny_kernel[(triton.cdiv(num_outputs, config["block_n"]), num_splits)](
        x_MK,
        weight_NK,
        bias_N,
        y,
        parts,
        num_rows,
        num_outputs,
        x_MK.stride(0),
        weight_NK.stride(0),
        *_race_arguments(race),
        NUM_INPUTS=num_inputs,
        SPLIT_INPUTS=split_inputs,
        ACTIVATION=activation,
        HAS_BIAS=bias_N is not None,
        EARLY_START=config.get("early_start", False),
        BLOCK_M=config.get("block_m") or max(triton.next_power_of_2(num_rows), 16),
        BLOCK_N=config["block_n"],
        BLOCK_K=config["block_k"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **_launch_options(config),
    )
    if parts is not None:
        block = min(triton.next_power_of_2(num_outputs), 512)
        _add_parts_kernel[(num_rows, triton.cdiv(num_outputs, block))](
            x_MK,
            parts,
            bias_N,
            y,
            num_rows,
            num_outputs,
            NUM_SPLITS=num_splits,
            ACTIVATION=activation,
            HAS_BIAS=bias_N is not None,
            EARLY_START=config.get("early_start", False),
            BLOCK=block,
            num_warps=4,
            **_launch_options(config),
        )


def _race_arguments(race: tuple[RaceRows, HeadScores, int] | None) -> tuple[torch.Tensor | int | None, ...]:
    """For the parameters of _RACE and `first_token`."""
    if race is None:
        return (*[None] * len(_RACE), 0)
    rows, scores, first_token = race
    return (*race_tensors(rows, scores), first_token)
