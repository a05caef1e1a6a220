"""Repetition, presence and frequency penalties on logits, in place.

For a token v of a row, in this order:

    v in prompt or output:  logit = logit / repetition if logit > 0 else logit * repetition       (Hugging Face)
    v in output:            logit = logit - presence - frequency * (times v is in the output)      (OpenAI)

The tables hold what a row has seen, one table row a sequence that has penalties: `prompt_mask` and `output_counts`;
`record_tokens` counts what was drawn. S rows of logits, V vocabulary, R table rows.
Source: Keskar et al. 2019, "CTRL" (repetition); the OpenAI API reference (presence, frequency).
"""

import torch
import triton
import triton.language as tl

from .cpu import ops as cpu_ops
from .dispatch import choose_backend


def apply_penalties(
    logits_SV: torch.Tensor,
    *,
    prompt_mask_RV: torch.Tensor,
    output_counts_RV: torch.Tensor,
    table_rows_S: torch.Tensor,
    repetition_S: torch.Tensor,
    presence_S: torch.Tensor,
    frequency_S: torch.Tensor,
) -> None:
    """Changes float32 logits in place. `prompt_mask` is bool, `output_counts` int32, the three penalties float32.

    `table_rows` (int64) is the table row of each row of logits; below zero: no penalties, the row stays untouched.
    ValueError where shapes or dtypes do not fit.
    """
    _check(logits_SV, prompt_mask_RV, output_counts_RV, table_rows_S, repetition_S, presence_S, frequency_S)
    backend = choose_backend("apply_penalties", logits_SV)
    run = apply_penalties_ref
    if backend != "reference":
        run = cpu_ops.apply_penalties if backend == "cpp" else _apply_penalties_triton
    run(
        logits_SV,
        prompt_mask_RV=prompt_mask_RV,
        output_counts_RV=output_counts_RV,
        table_rows_S=table_rows_S,
        repetition_S=repetition_S,
        presence_S=presence_S,
        frequency_S=frequency_S,
    )


def apply_penalties_ref(
    logits_SV: torch.Tensor,
    *,
    prompt_mask_RV: torch.Tensor,
    output_counts_RV: torch.Tensor,
    table_rows_S: torch.Tensor,
    repetition_S: torch.Tensor,
    presence_S: torch.Tensor,
    frequency_S: torch.Tensor,
) -> None:
    penalized = table_rows_S >= 0
    rows = table_rows_S[penalized]
    logits, counts = logits_SV[penalized], output_counts_RV[rows]
    repetition, presence, frequency = (x[penalized].unsqueeze(1) for x in (repetition_S, presence_S, frequency_S))
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(prompt_mask_RV[rows] | (counts > 0), repeated, logits)
    logits_SV[penalized] = torch.where(counts > 0, logits - presence - frequency * counts, logits)


# Read a number at a time: a second compilation for another alignment would gain nothing.
@triton.jit(do_not_specialize_on_alignment=["table_rows", "repetitions", "presences", "frequencies"])
def _apply_penalties_kernel(
    logits,
    prompt_mask,
    output_counts,
    table_rows,
    repetitions,
    presences,
    frequencies,
    vocab,
    stride_logits,
    stride_prompt,
    stride_output,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    table_row = tl.load(table_rows + row)
    if table_row < 0:
        return
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    values = tl.load(logits + row * stride_logits + token, inside, other=0.0)
    in_prompt = tl.load(prompt_mask + table_row * stride_prompt + token, inside, other=0) != 0
    count = tl.load(output_counts + table_row * stride_output + token, inside, other=0)
    repetition = tl.load(repetitions + row)
    repeated = tl.where(values > 0, values / repetition, values * repetition)
    values = tl.where(in_prompt | (count > 0), repeated, values)
    penalized = values - tl.load(presences + row) - tl.load(frequencies + row) * count.to(tl.float32)
    tl.store(logits + row * stride_logits + token, tl.where(count > 0, penalized, values), inside)


def _apply_penalties_triton(
    logits_SV: torch.Tensor,
    *,
    prompt_mask_RV: torch.Tensor,
    output_counts_RV: torch.Tensor,
    table_rows_S: torch.Tensor,
    repetition_S: torch.Tensor,
    presence_S: torch.Tensor,
    frequency_S: torch.Tensor,
) -> None:
    num_rows, vocab = logits_SV.shape
    if logits_SV.numel() == 0:
        return
    block = min(triton.next_power_of_2(vocab), 2048)
    _apply_penalties_kernel[(num_rows, triton.cdiv(vocab, block))](
        logits_SV,
        prompt_mask_RV.view(torch.uint8),
        output_counts_RV,
        table_rows_S,
        repetition_S,
        presence_S,
        frequency_S,
        vocab,
        logits_SV.stride(0),
        prompt_mask_RV.stride(0),
        output_counts_RV.stride(0),
        BLOCK=block,
    )


def record_tokens(output_counts_RV: torch.Tensor, table_rows_S: torch.Tensor, tokens_S: torch.Tensor) -> None:
    """Counts one drawn token a row, in place; rows whose table row is below zero are left out."""
    counted_S = (table_rows_S >= 0).to(output_counts_RV.dtype)
    output_counts_RV.index_put_((table_rows_S.clamp(min=0), tokens_S), counted_S, accumulate=True)


def _check(
    logits_SV: torch.Tensor,
    prompt_mask_RV: torch.Tensor,
    output_counts_RV: torch.Tensor,
    table_rows_S: torch.Tensor,
    repetition_S: torch.Tensor,
    presence_S: torch.Tensor,
    frequency_S: torch.Tensor,
) -> None:
    if logits_SV.dim() != 2 or logits_SV.dtype != torch.float32 or logits_SV.stride(1) != 1:
        raise ValueError(f"apply_penalties: logits {tuple(logits_SV.shape)} {logits_SV.dtype} must be float32 [S, V]")
    if prompt_mask_RV.stride(-1) != 1 or output_counts_RV.stride(-1) != 1:
        raise ValueError("apply_penalties: the last dimension of the tables must be contiguous")
    if prompt_mask_RV.dtype != torch.bool or output_counts_RV.dtype != torch.int32:
        raise ValueError(
            f"apply_penalties: prompt_mask must be bool and output_counts int32, not {prompt_mask_RV.dtype} and "
            f"{output_counts_RV.dtype}"
        )
    if prompt_mask_RV.shape != output_counts_RV.shape or prompt_mask_RV.shape[1:] != logits_SV.shape[1:]:
        raise ValueError(
            f"apply_penalties: prompt_mask {tuple(prompt_mask_RV.shape)} and output_counts "
            f"{tuple(output_counts_RV.shape)} must be [table rows, {logits_SV.shape[1]}]"
        )
    for name, tensor, dtype in (
        ("table_rows", table_rows_S, torch.int64),
        ("repetition", repetition_S, torch.float32),
        ("presence", presence_S, torch.float32),
        ("frequency", frequency_S, torch.float32),
    ):
        if tensor.shape != logits_SV.shape[:1] or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"apply_penalties: {name} {tuple(tensor.shape)} {tensor.dtype} must be contiguous {dtype}, one a row"
            )
