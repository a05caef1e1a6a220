"""Draws one token a row from filtered logits, greedy rows and sampled rows in one call.

    kept  = tokens that top_k, top_p and min_p leave (sampling_filter)
    token = argmax over kept of  logit + temperature * g,   g = -log(-log(1 - u)),   u = philox_uniform(seed, position)[token]

g is Gumbel noise, so that the argmax is a draw from softmax(kept logits / temperature); temperature 0 is the plain argmax.
The noise belongs to (seed, position, token id) alone: the draw does not depend on the batch or on the device (but for
rounding, where two scores tie within float32), and a shard of the vocabulary can run its own part of the race.
Of equal scores the lowest id wins.

S rows, V vocabulary. Source: Gumbel 1954; Maddison et al. 2014, "A* Sampling".
"""

import torch
import triton
import triton.language as tl

from .cpu import ops as cpu_ops
from .dispatch import choose_backend
from .philox import philox_uniform_ref, uniform_block
from .sampling_filter import keep_threshold_ref, keep_threshold_triton


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
    """tokens_S int64. Logits, temperature, top_p and min_p float32; top_k int32; seeds and positions int64.

    Off: temperature 0 (greedy), top_k <= 0, top_p >= 1, min_p <= 0. A logit of -inf is not drawn while another
    is finite; a row of nothing but NaN or -inf draws some token of the vocabulary, and the other rows do not notice.
    ValueError where shapes or dtypes do not fit.
    """
    _check(logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, seeds_S, positions_S)
    backend = choose_backend("sample", logits_SV)
    run = sample_ref
    if backend != "reference":
        run = cpu_ops.sample if backend == "cpp" else _sample_triton
    return run(
        logits_SV,
        temperature_S=temperature_S,
        top_k_S=top_k_S,
        top_p_S=top_p_S,
        min_p_S=min_p_S,
        seeds_S=seeds_S,
        positions_S=positions_S,
    )


def sample_ref(
    logits_SV: torch.Tensor,
    *,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    seeds_S: torch.Tensor,
    positions_S: torch.Tensor,
) -> torch.Tensor:
    threshold_S = keep_threshold_ref(logits_SV, temperature_S, top_k_S, top_p_S, min_p_S)
    uniform_SV = philox_uniform_ref(seeds_S, positions_S, logits_SV.shape[1])
    # log1p keeps the small exponentials exact, and these win the race.
    gumbel_SV = -torch.log(-torch.log1p(-uniform_SV))
    scores_SV = logits_SV + temperature_S.unsqueeze(1) * gumbel_SV
    return scores_SV.masked_fill(logits_SV < threshold_S.unsqueeze(1), float("-inf")).argmax(-1)


@triton.jit
def _gumbel(uniform):
    """-log(-log(1 - u)); small exponentials win the race, so below 2^-7 their series keeps what 1 - u would round away."""
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.3333333333333333 + uniform * 0.25)))
    exponential = tl.where(uniform < 0.0078125, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def _race_kernel(
    logits,
    thresholds,
    temperatures,
    seeds,
    positions,
    chunk_scores,
    chunk_tokens,
    vocab,
    stride_logits,
    BLOCK: tl.constexpr,
):
    """One program a row and a chunk of the vocabulary: the chunk's best score and the lowest token that has it."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * stride_logits + token, token < vocab, other=-float("inf"))
    temperature = tl.load(temperatures + row)
    scores = values
    if temperature > 0:
        uniform = uniform_block(tl.load(seeds + row), tl.load(positions + row), chunk * BLOCK, BLOCK)
        scores = values + temperature * _gumbel(uniform)
    scores = tl.where(values >= tl.load(thresholds + row), scores, -float("inf"))
    best = tl.max(scores, axis=0)
    out = row * tl.num_programs(1) + chunk
    tl.store(chunk_scores + out, best)
    tl.store(chunk_tokens + out, tl.min(tl.where(scores == best, token, vocab - 1), axis=0))


@triton.jit
def _finish_race_kernel(chunk_scores, chunk_tokens, tokens, vocab, num_chunks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    inside = chunk < num_chunks
    scores = tl.load(chunk_scores + row * num_chunks + chunk, inside, other=-float("inf"))
    candidates = tl.load(chunk_tokens + row * num_chunks + chunk, inside, other=vocab - 1)
    best = tl.max(scores, axis=0)
    tl.store(tokens + row, tl.min(tl.where(scores == best, candidates, vocab - 1), axis=0).to(tl.int64))


def _sample_triton(
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
    tokens_S = torch.empty(num_rows, dtype=torch.int64, device=logits_SV.device)
    if num_rows == 0:
        return tokens_S
    threshold_S = keep_threshold_triton(logits_SV, temperature_S, top_k_S, top_p_S, min_p_S)
    block = min(max(triton.next_power_of_2(vocab), 16), 4096)
    num_chunks = triton.cdiv(vocab, block)
    chunk_scores = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=logits_SV.device)
    chunk_tokens = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits_SV.device)
    _race_kernel[(num_rows, num_chunks)](
        logits_SV,
        threshold_S,
        temperature_S,
        seeds_S,
        positions_S,
        chunk_scores,
        chunk_tokens,
        vocab,
        logits_SV.stride(0),
        BLOCK=block,
        num_warps=8,
    )
    _finish_race_kernel[(num_rows,)](
        chunk_scores, chunk_tokens, tokens_S, vocab, num_chunks, BLOCK=triton.next_power_of_2(num_chunks), num_warps=1
    )
    return tokens_S


def _check(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    seeds_S: torch.Tensor,
    positions_S: torch.Tensor,
) -> None:
    if logits_SV.dim() != 2 or logits_SV.shape[1] == 0 or logits_SV.dtype != torch.float32 or logits_SV.stride(1) != 1:
        raise ValueError(f"sample: logits {tuple(logits_SV.shape)} {logits_SV.dtype} must be float32 [rows, vocabulary]")
    for name, tensor, dtype in (
        ("temperature", temperature_S, torch.float32),
        ("top_k", top_k_S, torch.int32),
        ("top_p", top_p_S, torch.float32),
        ("min_p", min_p_S, torch.float32),
        ("seeds", seeds_S, torch.int64),
        ("positions", positions_S, torch.int64),
    ):
        if tensor.shape != logits_SV.shape[:1] or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"sample: {name} {tuple(tensor.shape)} {tensor.dtype} must be contiguous {dtype}, one a row of logits "
                f"{tuple(logits_SV.shape)}"
            )
