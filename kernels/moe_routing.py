"""Chooses each token's experts and their weights.

    probabilities = softmax(logits) over all experts, float32
    experts       = the top_k largest, largest first; of equals the lowest expert id
    weights       = their probabilities; with renormalize divided by their sum

T tokens, E experts, C = top_k choices. Sources: Jiang et al. 2024, "Mixtral of Experts" (renormalised); Qwen3-MoE (its
norm_topk_prob decides).
"""

from __future__ import annotations

import torch

from .cpu import ops as cpu_ops
from .dispatch import choose_backend

# Largest |weight - reference|: (relative, absolute). The logits' dtype does not matter: all arithmetic is float32.
TOLERANCE = (1e-5, 1e-6)


def route_tokens(logits_TE: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TC float32, experts_TC int32). ValueError where top_k is not in 1..E or logits are not [T, E]."""
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"route_tokens: logits {tuple(logits_TE.shape)} {logits_TE.dtype} must be float [tokens, experts]")
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"route_tokens: top_k {top_k} must be between 1 and the {logits_TE.shape[1]} experts")
    backend = choose_backend("route_tokens", logits_TE)
    if backend == "cpp":
        return cpu_ops.route_tokens(logits_TE, top_k, renormalize=renormalize)
    return route_tokens_ref(logits_TE, top_k, renormalize=renormalize)


def route_tokens_ref(logits_TE: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    probs_TE = logits_TE.float().softmax(-1)
    sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    weights_TC, experts_TC = sorted_TE[:, :top_k], order_TE[:, :top_k]
    if renormalize:
        weights_TC = weights_TC / weights_TC.sum(-1, keepdim=True)
    return weights_TC.contiguous(), experts_TC.to(torch.int32)
