"""Grouped GEMMs of experts over pairs sorted by expert (moe_sort.py), on tensor cores.

    gated_grouped_gemm:     h[pair] = activation(x[token] @ gate[e].T) * (x[token] @ up[e].T)
    weighted_grouped_gemm:  y[pair] = weights[pair] * (h[pair] @ down[e].T)

e is the expert of the pair; each product may have a bias of the expert's. Sums are float32; gate, up and each result are
rounded to the dtype of x once. Rows of pairs that belong to no expert stay unset.

Each expert's pairs are cut into tiles; a program takes one tile and a block of outputs. Which expert that is it finds from the
experts' starts, so the grid, the most tiles that there can be, follows from shapes alone: nothing is read on the host, and
programs without a tile come last.

With `sorted_rows` the rows of h lie in the order of `pairs`, so that a tile's are contiguous; else in that of pair.

T tokens, C choices a token, P = T * C pairs, E experts, H hidden, F intermediate, U = 2 F (gate in the first half), K inputs
and N outputs of a GEMM.
"""

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, load_settled, prefetch_to_l2, wait_for_previous
from .gated_activation import Activation, activate, activation_constants
from .grouped_gemm_tma import fits_tma, weighted_tma_gemm
from .grouped_tiles import GroupedConfig, find_tile, max_tiles

PREFETCHED_LINE = 128  # bytes
EARLY_PROGRAMS = tl.constexpr(512)  # so many or fewer fit a GPU at once: later ones have nothing to wait for


@triton.jit
def _prefetch(weight_N, is_wanted, NUM_LINES: tl.constexpr):
    if NUM_LINES > 0:  # noqa: SIM102 - known when the kernel is compiled, the other when it runs
        if is_wanted:
            line = tl.arange(0, NUM_LINES) * (1024 // weight_N.dtype.element_ty.primitive_bitwidth)
            prefetch_to_l2(weight_N[:, None] + line[None, :])


@triton.jit
def _grouped_gemm_kernel(  # noqa: PLR0912, PLR0915 - a kernel is one function
    x,
    weight,
    scales,
    y,
    pairs,
    expert_starts,
    num_inputs,
    num_outputs,
    num_experts,
    num_pairs,
    stride_x,
    stride_we,
    stride_wn,
    bias,
    PAIRS_PER_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SORTED_ROWS: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    AFTER_GATE_UP: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gated where ACTIVATION is named: the weight holds num_outputs gate rows, then as many up rows. Else scaled by pair.

    The gated kernel waits before it lets the next start, which the second GEMM relies on (AFTER_GATE_UP): that one finds its
    tile and asks for weights before it waits. So does the gated one, whose tile is not known while pairs are sorted, by the
    guess that every expert has one. A gated tile's columns are gate, up, gate, up...: one product serves both, and each gate
    lies in one thread with its up. Rows and columns outside read others' values, not a mask, and are not stored. `bias`, where
    there is one, has a number for each row of the weight.
    """
    PREFETCHED: tl.constexpr = PREFETCH_LINES if EARLY_START else 0
    is_early = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) < EARLY_PROGRAMS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    COLUMNS: tl.constexpr = BLOCK_N if ACTIVATION is None else 2 * BLOCK_N
    column = tl.arange(0, COLUMNS)
    if ACTIVATION is None:
        weight_row = tl.minimum(tl.program_id(0) * BLOCK_N + column, num_outputs - 1)
    else:
        weight_row = tl.minimum(tl.program_id(0) * BLOCK_N + column // 2, num_outputs - 1) + (column % 2) * num_outputs
    weight_N = weight + weight_row.to(tl.int64) * stride_wn
    if ACTIVATION is not None:
        guess = tl.program_id(1)
        _prefetch(weight_N + guess.to(tl.int64) * stride_we, is_early & (guess < num_experts), PREFETCHED)
    if ACTIVATION is not None or not AFTER_GATE_UP:
        wait_for_previous(EARLY_START)
    let_next_start(EARLY_START)
    expert, first, end = find_tile(expert_starts, tl.program_id(1), num_experts, BLOCK_M, BLOCK_E)
    weight_N += expert.to(tl.int64) * stride_we
    m = first + tl.arange(0, BLOCK_M)
    pair = load_settled(pairs + m, m < end, 0)
    if ACTIVATION is None and AFTER_GATE_UP:
        _prefetch(weight_N, is_early & (expert < num_experts), PREFETCHED)
        wait_for_previous(EARLY_START)
    if expert >= num_experts:
        return
    weight_KN = weight_N[None, :] + k[:, None]
    x_row = tl.minimum(m, num_pairs - 1) if SORTED_ROWS and ACTIVATION is None else pair // PAIRS_PER_ROW
    x_MK = x + (x_row.to(tl.int64) * stride_x)[:, None] + k[None, :]
    if HAS_BIAS:  # asked for before the products, which hide its way
        bias_rows = num_outputs if ACTIVATION is None else 2 * num_outputs
        bias_N = tl.load(bias + expert.to(tl.int64) * bias_rows + weight_row).to(tl.float32)
    sum_MN = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        if EVEN_K:
            inputs = tl.load(x_MK + start)
            outputs = tl.load(weight_KN + start)
        else:
            inputs = tl.load(x_MK + start, (start + k < num_inputs)[None, :], other=0.0)
            outputs = tl.load(weight_KN + start, (start + k < num_inputs)[:, None], other=0.0)
        sum_MN = tl.dot(inputs, outputs.to(inputs.dtype), sum_MN, input_precision="ieee")
    if HAS_BIAS:
        sum_MN += bias_N[None, :]
    dtype = y.dtype.element_ty
    if ACTIVATION is not None:
        gate_MN, up_MN = tl.split(sum_MN.to(dtype).reshape(BLOCK_M, BLOCK_N, 2))
        y_tile = activate(gate_MN.to(tl.float32), up_MN.to(tl.float32), ACTIVATION, ALPHA, LIMIT).to(dtype)
    else:
        y_tile = (sum_MN * tl.load(scales + pair, m < end, other=0.0)[:, None]).to(dtype)
    y_row = m if SORTED_ROWS and ACTIVATION is not None else pair
    y_MN = y + (y_row.to(tl.int64) * num_outputs)[:, None] + n[None, :]
    tl.store(y_MN, y_tile, (m < end)[:, None] & (n < num_outputs)[None, :])


def gated_grouped_gemm(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    pairs_P: torch.Tensor,
    expert_starts: torch.Tensor,
    activation: Activation,
    *,
    config: GroupedConfig,
    sorted_rows: bool,
    bias_EU: torch.Tensor | None = None,
) -> torch.Tensor:
    """h [P, F] of x's dtype."""
    h_PF = x_TH.new_empty(pairs_P.shape[0], gate_up_weight_EUH.shape[1] // 2)
    _launch(
        x_TH,
        gate_up_weight_EUH,
        None,
        h_PF,
        pairs_P,
        expert_starts,
        activation=activation,
        config=config,
        sorted_rows=sorted_rows,
        after_gate_up=False,
        bias_EN=bias_EU,
    )
    return h_PF


def weighted_grouped_gemm(
    h_PF: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    pairs_P: torch.Tensor,
    expert_starts: torch.Tensor,
    *,
    config: GroupedConfig,
    sorted_rows: bool,
    after_gate_up: bool,
    bias_EH: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [P, H] of h's dtype, in the order of pair. `after_gate_up`: see run_down."""
    y_PH = h_PF.new_empty(h_PF.shape[0], down_weight_EHF.shape[1])
    if config.tma and sorted_rows and fits_tma(h_PF, down_weight_EHF):
        weighted_tma_gemm(h_PF, down_weight_EHF, weights_TC, y_PH, pairs_P, expert_starts, config=config, bias_EH=bias_EH)
        return y_PH
    _launch(
        h_PF,
        down_weight_EHF,
        weights_TC,
        y_PH,
        pairs_P,
        expert_starts,
        activation=None,
        config=config,
        sorted_rows=sorted_rows,
        after_gate_up=after_gate_up,
        bias_EN=bias_EH,
    )
    return y_PH


def _launch(
    x_RK: torch.Tensor,
    weight_ENK: torch.Tensor,
    scales: torch.Tensor | None,
    y_PN: torch.Tensor,
    pairs_P: torch.Tensor,
    expert_starts: torch.Tensor,
    *,
    activation: Activation | None,
    config: GroupedConfig,
    sorted_rows: bool,
    after_gate_up: bool,
    bias_EN: torch.Tensor | None,
) -> None:
    num_experts, _, num_inputs = weight_ENK.shape
    num_pairs, num_outputs = y_PN.shape
    grid = (triton.cdiv(num_outputs, config.block_n), max_tiles(num_pairs, num_experts, config.block_m))
    lines_a_row = num_inputs * weight_ENK.element_size() // PREFETCHED_LINE
    _grouped_gemm_kernel[grid](
        x_RK,
        weight_ENK,
        scales,
        y_PN,
        pairs_P,
        expert_starts,
        num_inputs,
        num_outputs,
        num_experts,
        num_pairs,
        x_RK.stride(0),
        weight_ENK.stride(0),
        weight_ENK.stride(1),
        bias_EN,
        PAIRS_PER_ROW=num_pairs // x_RK.shape[0],
        HAS_BIAS=bias_EN is not None,
        EVEN_K=num_inputs % config.block_k == 0,
        SORTED_ROWS=sorted_rows,
        PREFETCH_LINES=config.prefetch_lines if config.prefetch_lines <= lines_a_row else 0,
        AFTER_GATE_UP=after_gate_up,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_E=triton.next_power_of_2(num_experts),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **activation_constants(activation),
        **launch_options(x_RK.device),
    )
