"""Linear layers for few rows on compute capability 9.0, at the rate of memory: the launcher of cuda/streaming_linear.cu.

It is the twin of skinny_linear's kernels: y = x @ weight.T + bias, plain or with a gated activation, with the same roundings,
for 16-bit numbers and up to 128 rows. A CTA owns `tile_n` rows of the weight (gated: half of them gates, half ups) and copies
them through `num_stages` stages of 64 inputs each; x follows in the same stages, or has `x_stages` of its own. `split_k` CTAs,
one cluster, share the inputs of a tile and add their sums in a fixed order. With an early start the stages are full of weight
before the kernel waits for the one before it.

M rows, K inputs, N outputs (rows of the weight). A config (kernels/tuning.py) is
    {"kernel": "streaming", "tile_n": 64 | 128 | 192 | 256, "split_k": 1..8, "num_stages", "x_stages", "early_start", "twin"}
where "twin" is the config of what serves the layer where this kernel cannot run; without "x_stages" x has no stages of its own.
A head that races (head_race.py) is the same kernel with another end (cuda/race.cuh), and does not share its inputs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import triton

from .cuda import loader
from .gated_activation import ACTIVATIONS
from .race import HeadScores, RaceRows, race_tensors
from .tuning import Config

MAX_STREAMING_ROWS = 128
TILES = (64, 128, 192, 256)
MAX_SPLITS = 8  # CTAs of a cluster that every GPU takes
MAX_STAGES = 32
STEP_INPUTS = 64  # of a stage: 128 bytes of each row
MIN_BESIDE_SUMS = 4  # stages of the weight; with fewer the sums had better take the stages' place
SOURCE = "streaming_linear"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a config is launched on one shape; the names of streaming_linear.cu."""

    macros: tuple[tuple[str, int], ...]  # ROWS, TILE, GATED and ONE_RING, without the dtype
    rows: int  # of x in shared memory
    outputs: int  # of a CTA
    num_splits: int
    num_tiles: int
    num_threads: int
    steps_each: int
    extra_steps: int
    units_each: int
    num_stages: int
    x_stages: int
    reuses_stages: bool  # the sums take the place of the stages
    shared_bytes: int


def launch_streaming(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, y: torch.Tensor, activation: str, config: Config
) -> None:
    """Writes y [M, N], or [M, N / 2] with an activation. ValueError where `unfit_reason` has one."""
    _launch(x_MK, weight_NK, bias_N, y, activation, config, race=None)


def launch_race(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, rows: RaceRows, scores: HeadScores, config: Config, *, first_token: int
) -> None:
    """Fills the scores, as head_race.py says. ValueError where `unfit_reason` has one."""
    assert scores.bests is not None
    assert scores.bests.tile == config["tile_n"]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in race_tensors(rows, scores)]
    race = (ctypes.c_uint64 * (len(addresses) + 1))(*addresses, first_token)
    _launch(x_MK, weight_NK, None, scores.logits_SV, "", config, race=race)


def _launch(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    y: torch.Tensor,
    activation: str,
    config: Config,
    *,
    race: ctypes.Array[ctypes.c_uint64] | None,
) -> None:
    num_rows, num_outputs = y.shape
    reason = unfit_reason(config, weight_NK, num_rows, gated=bool(activation), race=race is not None)
    if reason is not None:
        raise ValueError(f"streaming_linear: {reason}")
    plan = plan_launch(config, num_rows, num_outputs, weight_NK.shape[1], bool(activation))
    kernel = _load(plan, weight_NK, race=race is not None)
    assert kernel is not None  # unfit_reason has loaded it
    x_MK = _aligned(x_MK)
    loader.launch(
        kernel,
        (
            _tensor_map(weight_NK, plan.outputs),
            _tensor_map(x_MK, plan.rows),
            ctypes.c_void_p(None if bias_N is None else bias_N.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int(num_rows),
            ctypes.c_int(num_outputs),
            ctypes.c_int(plan.steps_each),
            ctypes.c_int(plan.extra_steps),
            ctypes.c_int(plan.units_each),
            ctypes.c_int(plan.num_stages),
            ctypes.c_int(plan.x_stages),
            ctypes.c_int(plan.reuses_stages),
            ctypes.c_int(ACTIVATIONS.index(activation) if activation else 0),
            ctypes.c_int(y.dtype == torch.float32),
            *(() if race is None else (race,)),
        ),
        grid=(plan.num_splits, plan.num_tiles),
        num_threads=plan.num_threads,
        shared_bytes=plan.shared_bytes,
        cluster_size=plan.num_splits,
        early_start=config.get("early_start", False),
    )


def serves(config: Config, weight_NK: torch.Tensor, num_rows: int, *, gated: bool, race: bool = False) -> bool:
    """Whether the kernel can run; where not, the reason has been logged once. Compiles at the first call."""
    instead = "all logits are stored" if race else "cuBLAS does"
    return loader.is_served(SOURCE, unfit_reason(config, weight_NK, num_rows, gated=gated, race=race), instead=instead)


def unfit_reason(config: Config, weight_NK: torch.Tensor, num_rows: int, *, gated: bool, race: bool = False) -> str | None:
    """Why the kernel cannot run with this config on this weight, or None."""
    num_outputs, num_inputs = weight_NK.shape
    reason = unfit_sizes(config, num_rows, num_inputs, gated=gated, race=race)
    if reason is not None:
        return reason
    if weight_NK.dtype not in (torch.bfloat16, torch.float16):
        return f"the weight is {weight_NK.dtype}, it takes bfloat16 and float16"
    if not _is_aligned(weight_NK):
        return f"the weight's rows (stride {weight_NK.stride(0)}) must lie apart by multiples of 16 bytes and begin at one"
    reason = loader.misplaced_reason("the weight", weight_NK.device)
    if reason is not None:
        return reason
    plan = plan_launch(config, num_rows, num_outputs // 2 if gated else num_outputs, num_inputs, gated)
    if _load(plan, weight_NK, race=race) is None:
        return f"it cannot be compiled: {loader.unavailable_reason()}"
    return None


def unfit_sizes(config: Config, num_rows: int, num_inputs: int, *, gated: bool = False, race: bool = False) -> str | None:
    """Why the config does not suit these sizes, or None."""
    tile_n, split_k, num_stages = config["tile_n"], config["split_k"], config["num_stages"]
    x_stages = config.get("x_stages", num_stages)
    limits = (
        (0 < num_rows <= MAX_STREAMING_ROWS, f"{num_rows} rows, it takes 1 to {MAX_STREAMING_ROWS}"),
        (tile_n in TILES, f"tile_n {tile_n} is not one of {TILES}"),
        (1 <= split_k <= MAX_SPLITS, f"split_k {split_k} is not 1 to {MAX_SPLITS}"),
        (2 <= num_stages <= MAX_STAGES, f"num_stages {num_stages} is not 2 to {MAX_STAGES}"),
        (2 <= x_stages <= MAX_STAGES, f"x_stages {x_stages} is not 2 to {MAX_STAGES}"),
        (split_k == 1 or not race, f"split_k {split_k}, a head that races does not share its inputs"),
        (split_k <= triton.cdiv(num_inputs, STEP_INPUTS), f"{num_inputs} inputs are too few to split by {split_k}"),
    )
    for is_kept, reason in limits:
        if not is_kept:
            return reason
    shared_bytes = plan_launch(config, num_rows, 1, num_inputs, gated).shared_bytes
    if shared_bytes > loader.MAX_SHARED_BYTES:
        return f"{num_stages} stages need {shared_bytes} bytes of shared memory, there are {loader.MAX_SHARED_BYTES}"
    return None


@cache
def _plan(
    tile_n: int,
    split_k: int,
    num_stages: int,
    x_stages: int | None,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    gated: bool,
) -> Plan:
    rows = max(triton.next_power_of_2(num_rows), 8)
    outputs = tile_n // 2 if gated else tile_n
    steps_each, extra_steps = divmod(triton.cdiv(num_inputs, STEP_INPUTS), split_k)
    most_steps = steps_each + (extra_steps > 0)
    weight_stages, x_stages_used = min(num_stages, most_steps), min(x_stages or num_stages, most_steps)
    stages = weight_stages * row_bytes(tile_n) + x_stages_used * row_bytes(rows)
    sums = sums_bytes(tile_n, split_k, rows, gated=gated)
    is_crowded = x_stages is None or split_k == 1 or 1024 + stages + sums > loader.MAX_SHARED_BYTES
    reuses_stages = rows >= 64 and is_crowded
    return Plan(
        macros=(("ROWS", rows), ("TILE", tile_n), ("GATED", int(gated)), ("ONE_RING", int(x_stages is None))),
        rows=rows,
        outputs=outputs,
        num_splits=split_k,
        num_tiles=triton.cdiv(num_outputs, outputs),
        num_threads=tile_n // 64 * 128 + 64,
        steps_each=steps_each,
        extra_steps=extra_steps,
        units_each=_units_each(outputs, split_k),
        num_stages=weight_stages,
        x_stages=x_stages_used,
        reuses_stages=reuses_stages,
        shared_bytes=1024 + (max(stages, sums) if reuses_stages else stages + sums),
    )


def plan_launch(config: Config, num_rows: int, num_outputs: int, num_inputs: int, gated: bool) -> Plan:
    """`num_outputs` are those of y. The stages are no more than there are steps."""
    tile_n, split_k, num_stages = config["tile_n"], config["split_k"], config["num_stages"]
    return _plan(tile_n, split_k, num_stages, config.get("x_stages"), num_rows, num_outputs, num_inputs, gated)


def row_bytes(num_rows: int) -> int:
    """Shared memory of so many rows of a stage."""
    return num_rows * STEP_INPUTS * 2


def sums_bytes(tile_n: int, split_k: int, rows: int, *, gated: bool) -> int:
    """Shared memory of the sums that a CTA gets from all of its cluster, for `rows` rows of x."""
    units_each = _units_each(tile_n // 2 if gated else tile_n, split_k)
    return split_k * rows * (units_each * 8 * (2 if gated else 1) + 4) * 4


def stages_within(
    shared_bytes: int, tile_n: int, split_k: int, num_rows: int, *, gated: bool, x_stages: int | None = None
) -> int:
    """How many stages of the weight fit into so much shared memory, 2 at least; with as many of x, or `x_stages`."""
    rows = max(triton.next_power_of_2(num_rows), 8)
    room = shared_bytes - 1024 - (x_stages or 0) * row_bytes(rows)
    size = row_bytes(tile_n if x_stages else tile_n + rows)
    beside_sums = (room - sums_bytes(tile_n, split_k, rows, gated=gated)) // size
    can_reuse = rows >= 64 and (x_stages is None or split_k == 1 or beside_sums < MIN_BESIDE_SUMS)
    return min(max(room // size if can_reuse else beside_sums, 2), MAX_STAGES)


def _units_each(outputs: int, split_k: int) -> int:
    return triton.cdiv(outputs // 8, split_k)


def split_steps(plan: Plan) -> list[range]:
    """The steps of 64 inputs of each CTA of a cluster, as the kernel counts them."""
    starts = [split * plan.steps_each + min(split, plan.extra_steps) for split in range(plan.num_splits + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def _load(plan: Plan, weight_NK: torch.Tensor, *, race: bool) -> loader.Kernel | None:
    macros = (*plan.macros, ("FLOAT16", int(weight_NK.dtype == torch.float16)), *((("RACE", 1),) if race else ()))
    return loader.load(SOURCE, macros, weight_NK.device.index)


def _tensor_map(matrix: torch.Tensor, box_rows: int) -> loader.TensorMap:
    rows, columns = matrix.shape
    stride = matrix.stride(0) if rows > 1 else triton.cdiv(columns, 8) * 8
    return loader.tensor_map(matrix.data_ptr(), matrix.dtype, (rows, columns), stride, (box_rows, STEP_INPUTS))


def _is_aligned(matrix: torch.Tensor) -> bool:
    """Whether its rows begin at multiples of 16 bytes and do not overlap."""
    stride = matrix.stride(0)
    return matrix.data_ptr() % 16 == 0 and (matrix.shape[0] == 1 or (stride % 8 == 0 and stride >= matrix.shape[1]))


def _aligned(x_MK: torch.Tensor) -> torch.Tensor:
    """x itself, or a copy that the copy engine can read."""
    if _is_aligned(x_MK):
        return x_MK
    num_rows, num_inputs = x_MK.shape
    copy = x_MK.new_empty(num_rows, triton.cdiv(num_inputs, 8) * 8)[:, :num_inputs]
    return copy.copy_(x_MK)
