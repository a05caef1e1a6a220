"""Calls of the C++ kernels that turn logits into tokens; like `ops`, whose names these are too."""

from __future__ import annotations

import torch

from .library import kernels
from .threads import num_threads


def sample(
    logits_SV: torch.Tensor,
    *,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    seeds_S: torch.Tensor,
    positions_S: torch.Tensor,
) -> torch.Tensor:
    num_rows, vocab = logits_SV.shape
    parameters = [x.contiguous() for x in (temperature_S, top_k_S, top_p_S, min_p_S, seeds_S, positions_S)]
    tokens_S = torch.empty(num_rows, dtype=torch.int64)
    kernels().pilotfish_sample(
        logits_SV.data_ptr(),
        logits_SV.stride(0),
        *(x.data_ptr() for x in parameters),
        tokens_S.data_ptr(),
        num_rows,
        vocab,
        num_threads(),
    )
    return tokens_S


def race(
    logits_SV: torch.Tensor,
    *,
    temperature_S: torch.Tensor,
    seeds_S: torch.Tensor,
    positions_S: torch.Tensor,
    first_token: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores_S, tokens_S counted from first_token)."""
    num_rows, vocab = logits_SV.shape
    parameters = [x.contiguous() for x in (temperature_S, seeds_S, positions_S)]
    scores_S, tokens_S = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
    kernels().pilotfish_race(
        logits_SV.data_ptr(),
        logits_SV.stride(0),
        *(x.data_ptr() for x in parameters),
        scores_S.data_ptr(),
        tokens_S.data_ptr(),
        num_rows,
        vocab,
        first_token,
        num_threads(),
    )
    return scores_S, tokens_S


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
    num_rows, vocab = logits_SV.shape
    parameters = [x.contiguous() for x in (table_rows_S, repetition_S, presence_S, frequency_S)]
    kernels().pilotfish_apply_penalties(
        logits_SV.data_ptr(),
        logits_SV.stride(0),
        prompt_mask_RV.data_ptr(),
        prompt_mask_RV.stride(0),
        output_counts_RV.data_ptr(),
        output_counts_RV.stride(0),
        *(x.data_ptr() for x in parameters),
        num_rows,
        vocab,
        num_threads(),
    )


def gather_logprobs(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, vocab = logits_SV.shape
    tokens_S = tokens_S.contiguous()
    logprob_S, top_logprobs_SM = torch.empty(num_rows), torch.empty(num_rows, num_top)
    rank_S, top_ids_SM = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, num_top, dtype=torch.int64)
    kernels().pilotfish_gather_logprobs(
        logits_SV.data_ptr(),
        logits_SV.stride(0),
        tokens_S.data_ptr(),
        logprob_S.data_ptr(),
        top_ids_SM.data_ptr(),
        top_logprobs_SM.data_ptr(),
        rank_S.data_ptr(),
        num_rows,
        vocab,
        num_top,
        num_threads(),
    )
    return logprob_S, top_ids_SM, top_logprobs_SM, rank_S
