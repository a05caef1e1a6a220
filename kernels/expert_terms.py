"""The weighted terms of each token's experts, which the last of moe_mlp's kernels may leave unsummed, and who sums them.

    sum_terms           s = sum over a token's choices, in their order, of its terms      float32, rounded to their dtype once
    sum_terms_and_norm  rms_norm(s, residual), to the bit, without the launch and the round trip to memory between the two

Terms come from kernels of Triton or CUDA C++ alone, so Triton serves both. The term of a negative expert (another rank's) is
unset and counts as zero. T tokens (one or more), C choices a token, P = T * C pairs, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, load_settled, wait_for_previous
from .rms_norm import norm_row, row_options


@dataclass(frozen=True, slots=True)
class ExpertTerms:
    """`y` contiguous, in the order of pair, as run_down of moe_mlp.py leaves it; `experts` int32."""

    y_PH: torch.Tensor
    experts_TC: torch.Tensor


# [T, H], or what it is the sum of.
Summands: TypeAlias = torch.Tensor | ExpertTerms

# Registers a thread. Without a limit the assembler makes do with 32, which hold three to five of eight terms at a time, so that
# a token takes several trips to memory one after another instead of one. 512 threads can have no more.
_MAX_REGISTERS = 128


def sum_terms(summands: Summands) -> torch.Tensor:
    """[T, H] of the dtype of the terms; a tensor is summed already."""
    if isinstance(summands, torch.Tensor):
        return summands
    y_PH, experts_TC = summands.y_PH, summands.experts_TC
    (num_tokens, num_choices), hidden = experts_TC.shape, y_PH.shape[1]
    out_TH = y_PH.new_empty(num_tokens, hidden)
    block = min(triton.next_power_of_2(hidden), 1024)
    _sum_kernel[(num_tokens, triton.cdiv(hidden, block))](
        y_PH,
        experts_TC,
        out_TH,
        HIDDEN=hidden,
        NUM_CHOICES=num_choices,
        BLOCK=block,
        maxnreg=_MAX_REGISTERS,
        **launch_options(y_PH.device),
    )
    return out_TH


def sum_terms_and_norm(
    terms: ExpertTerms, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the norm of s + residual, s + residual), as rms_norm answers. ValueError where shapes or dtypes do not fit."""
    y_PH, experts_TC = terms.y_PH, terms.experts_TC
    (num_tokens, num_choices), hidden = experts_TC.shape, y_PH.shape[1]
    if residual_TH.shape != (num_tokens, hidden) or residual_TH.dtype != y_PH.dtype or residual_TH.stride(1) != 1:
        raise ValueError(
            f"sum_terms_and_norm: residual {tuple(residual_TH.shape)} {residual_TH.dtype} must be {(num_tokens, hidden)} "
            f"{y_PH.dtype}, its last dimension contiguous"
        )
    if weight_H.shape != (hidden,) or weight_H.stride(0) != 1:
        raise ValueError(f"sum_terms_and_norm: weight {tuple(weight_H.shape)} must be {(hidden,)}, contiguous")
    normed_TH, sum_TH = (y_PH.new_empty(num_tokens, hidden) for _ in range(2))
    _sum_and_norm_kernel[(num_tokens,)](
        y_PH,
        experts_TC,
        residual_TH,
        weight_H,
        normed_TH,
        sum_TH,
        eps,
        residual_TH.stride(0),
        NUM_CHOICES=num_choices,
        maxnreg=_MAX_REGISTERS,
        **row_options(hidden),
        **launch_options(y_PH.device),
    )
    return normed_TH, sum_TH


@triton.jit
def _wait_and_sum(
    y, experts, token, column, HIDDEN: tl.constexpr, NUM_CHOICES: tl.constexpr, EARLY_START: tl.constexpr, BLOCK: tl.constexpr
):
    """Of a token's terms, weighted already, in the order of its choices: of their dtype, zero beyond HIDDEN.

    `experts` are settled before the wait of all that comes after y's kernel. For that one lets the next start after its own
    wait, when gate_up's has finished; or at once, but then (`after_gate_up`) it was started after the wait of gate_up's.
    """
    chosen = ()
    for choice in tl.static_range(NUM_CHOICES):
        chosen += (load_settled(experts + token * NUM_CHOICES + choice, True, -1),)  # type: ignore[assignment]
    wait_for_previous(EARLY_START)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(NUM_CHOICES):
        # A mask rather than a branch: the loads of all choices are in flight together.
        here = (tl.broadcast_to(chosen[choice], [BLOCK]) >= 0) & (column < HIDDEN)
        total += tl.load(y + (token * NUM_CHOICES + choice) * HIDDEN + column, here, other=0.0).to(tl.float32)
    return total.to(y.dtype.element_ty)


@triton.jit
def _sum_kernel(
    y, experts, out, HIDDEN: tl.constexpr, NUM_CHOICES: tl.constexpr, EARLY_START: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a token and block of H."""
    let_next_start(EARLY_START)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = _wait_and_sum(y, experts, token, column, HIDDEN, NUM_CHOICES, EARLY_START, BLOCK)
    tl.store(out + token * HIDDEN + column, total, column < HIDDEN)


@triton.jit
def _sum_and_norm_kernel(
    y,
    experts,
    residual,
    weight,
    normed,
    new_residual,
    eps,
    stride_residual,
    HIDDEN: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token."""
    let_next_start(EARLY_START)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    gain = tl.load(weight + column, inside, other=0.0).to(tl.float32)  # on its way while the kernel before ends
    total = _wait_and_sum(y, experts, token, column, HIDDEN, NUM_CHOICES, EARLY_START, BLOCK)
    added = tl.load(residual + token * stride_residual + column, inside, other=0.0)
    values = (total.to(tl.float32) + added.to(tl.float32)).to(total.dtype)
    tl.store(new_residual + token * HIDDEN + column, values, inside)
    tl.store(normed + token * HIDDEN + column, norm_row(values, gain, eps, HIDDEN), inside)
