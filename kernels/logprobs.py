"""Log-probabilities of drawn tokens and of each row's likeliest ones, from the raw logits.

    logprob(v) = logit(v) - log(sum exp(logits))       float32
    rank(v)    = 1 + the number of tokens whose logit is strictly greater

S rows, V vocabulary, M top tokens asked for.
"""

from __future__ import annotations

import torch

from .cpu import ops as cpu_ops
from .dispatch import choose_backend

# Largest |logprob - reference|: (relative, absolute).
TOLERANCE = (1e-5, 1e-5)


def gather_logprobs(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob_S float32, top_ids_SM int64, top_logprobs_SM float32, rank_S int64), the top ones likeliest first.

    Logits float32, tokens int64. Of equal logits any may come first in the top ones. ValueError where num_top is not in
    0..V or shapes or dtypes do not fit.
    """
    if logits_SV.dim() != 2 or logits_SV.dtype != torch.float32 or logits_SV.stride(1) != 1:
        raise ValueError(f"gather_logprobs: logits {tuple(logits_SV.shape)} {logits_SV.dtype} must be float32 [S, V]")
    if tokens_S.shape != logits_SV.shape[:1] or tokens_S.dtype != torch.int64:
        raise ValueError(f"gather_logprobs: tokens {tuple(tokens_S.shape)} {tokens_S.dtype} must be int64, one a row")
    if not 0 <= num_top <= logits_SV.shape[1]:
        raise ValueError(f"gather_logprobs: num_top {num_top} must be between 0 and {logits_SV.shape[1]}")
    backend = choose_backend("gather_logprobs", logits_SV, tokens_S)
    run = cpu_ops.gather_logprobs if backend == "cpp" else gather_logprobs_ref
    return run(logits_SV, tokens_S, num_top)


def gather_logprobs_ref(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logsumexp_S = logits_SV.logsumexp(-1)
    chosen_S1 = logits_SV.gather(1, tokens_S.unsqueeze(1))
    rank_S = 1 + (logits_SV > chosen_S1).sum(-1)
    top_SM, top_ids_SM = logits_SV.topk(num_top, dim=-1)
    return chosen_S1.squeeze(1) - logsumexp_S, top_ids_SM, top_SM - logsumexp_S.unsqueeze(1), rank_S
