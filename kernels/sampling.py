"""Draws one token a row from filtered logits, greedy rows and sampled rows in one call.

    kept  = tokens that top_k, top_p and min_p leave (sampling_filter)
    token = argmax over kept of  logit + temperature * g,   g = -log(-log(1 - u)),   u = philox_uniform(seed, position)[token]

g is Gumbel noise, so that the argmax is a draw from softmax(kept logits / temperature); temperature 0 is the plain argmax.
The noise belongs to (seed, position, token id) alone: the draw does not depend on the batch or on the device (but for
rounding, where two scores tie within float32), and a shard of the vocabulary can run its own part of the race.
Of equal scores the lowest id wins.

S rows, V vocabulary. Source: Gumbel 1954; Maddison et al. 2014, "A* Sampling".
"""

from __future__ import annotations

import torch

from .cpu import ops as cpu_ops
from .dispatch import choose_backend
from .philox import philox_uniform_ref
from .sampling_filter import keep_threshold_ref


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

    Off: temperature 0 (greedy), top_k <= 0, top_p >= 1, min_p <= 0. A logit of -inf is never drawn: a row needs one that
    is finite. ValueError where shapes or dtypes do not fit.
    """
    _check(logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, seeds_S, positions_S)
    backend = choose_backend("sample", logits_SV)
    run = cpu_ops.sample if backend == "cpp" else sample_ref
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


def _check(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    seeds_S: torch.Tensor,
    positions_S: torch.Tensor,
) -> None:
    if logits_SV.dim() != 2 or logits_SV.shape[1] == 0 or logits_SV.dtype != torch.float32:
        raise ValueError(f"sample: logits {tuple(logits_SV.shape)} {logits_SV.dtype} must be float32 [rows, vocabulary]")
    for name, tensor, dtype in (
        ("temperature", temperature_S, torch.float32),
        ("top_k", top_k_S, torch.int32),
        ("top_p", top_p_S, torch.float32),
        ("min_p", min_p_S, torch.float32),
        ("seeds", seeds_S, torch.int64),
        ("positions", positions_S, torch.int64),
    ):
        if tensor.shape != logits_SV.shape[:1] or tensor.dtype != dtype or tensor.device != logits_SV.device:
            raise ValueError(
                f"sample: {name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} must be {dtype}, one a row of "
                f"logits {tuple(logits_SV.shape)} on {logits_SV.device}"
            )
