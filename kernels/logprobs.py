"""Log-probabilities of drawn tokens and of each row's likeliest ones, from the raw logits.

    logprob(v) = logit(v) - log(sum exp(logits))       float32
    rank(v)    = 1 + the number of tokens whose logit is strictly greater

S rows, V vocabulary, M top tokens asked for.
"""

import torch
import triton
import triton.language as tl

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
    run = gather_logprobs_ref
    if backend != "reference":
        run = cpu_ops.gather_logprobs if backend == "cpp" else _gather_logprobs_triton
    return run(logits_SV, tokens_S, num_top)


def gather_logprobs_ref(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logsumexp_S = logits_SV.logsumexp(-1)
    chosen_S1 = logits_SV.gather(1, tokens_S.unsqueeze(1))
    rank_S = 1 + (logits_SV > chosen_S1).sum(-1)
    top_SM, top_ids_SM = logits_SV.topk(num_top, dim=-1)
    return chosen_S1.squeeze(1) - logsumexp_S, top_ids_SM, top_SM - logsumexp_S.unsqueeze(1), rank_S


@triton.jit
def _logsumexp_rank_kernel(logits, tokens, logsumexps, ranks, vocab, stride_logits, BLOCK: tl.constexpr):
    """One program a row, one pass: log(sum exp(logits)) and the rank of its token.

    Each column of the block has a largest logit, sum and count of its own, which are put together once at the end.
    """
    program = tl.program_id(0).to(tl.int64)
    row = logits + program * stride_logits
    chosen = tl.load(row + tl.load(tokens + program))
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(row + column, column < vocab, other=-float("inf"))
        above += (values > chosen).to(tl.int32)
        new_largest = tl.maximum(largest, values)
        # While only -inf was seen, a finite offset: -inf minus -inf is not a number.
        offset = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        total = total * tl.exp(largest - offset) + tl.exp(values - offset)
        largest = new_largest
    row_largest = tl.max(largest, axis=0)
    offset = tl.where(row_largest == -float("inf"), 0.0, row_largest)
    tl.store(logsumexps + program, row_largest + tl.log(tl.sum(total * tl.exp(largest - offset), axis=0)))
    tl.store(ranks + program, 1 + tl.sum(above, axis=0).to(tl.int64))


def _gather_logprobs_triton(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, vocab = logits_SV.shape
    logsumexp_S, rank_S = logits_SV.new_empty(num_rows), torch.empty_like(tokens_S)
    if num_rows > 0:
        _logsumexp_rank_kernel[(num_rows,)](
            logits_SV,
            tokens_S,
            logsumexp_S,
            rank_S,
            vocab,
            logits_SV.stride(0),
            BLOCK=min(triton.next_power_of_2(vocab), 8192),
            num_warps=16,
        )
    chosen_S = logits_SV.gather(1, tokens_S.unsqueeze(1)).squeeze(1)
    top_SM, top_ids_SM = logits_SV.topk(num_top, dim=-1)
    return chosen_S - logsumexp_S, top_ids_SM, top_SM - logsumexp_S.unsqueeze(1), rank_S
