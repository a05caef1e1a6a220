"""Which tokens may be drawn: top-k, top-p and min-p, as one threshold on a row's logits.

With p = softmax(logits / temperature), in the order of Hugging Face's warpers, each on what the one before kept:

    top_k   keeps the k largest logits, and those equal to the k-th             off where k <= 0
    top_p   keeps a token if all strictly likelier ones have less than top_p    off where top_p >= 1
    min_p   keeps a token if its p is at least min_p times the largest p        off where min_p <= 0

All three cut a row at a value of its logits, so that what is kept is {logit >= threshold}; ties are kept or dropped
together, and the largest logit is always kept. Temperature 0 (greedy) filters nothing.

S rows, V vocabulary. Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
"""

from __future__ import annotations

import torch


def keep_threshold_ref(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
) -> torch.Tensor:
    """threshold_S float32; -inf where nothing is filtered. float64 inside, by a full sort."""
    vocab = logits_SV.shape[1]
    sorted_SV = logits_SV.sort(dim=-1, descending=True).values
    largest_S1 = sorted_SV[:, :1]
    k_S = torch.where(top_k_S > 0, top_k_S.clamp(max=vocab), vocab).long()
    top_k_threshold_S1 = sorted_SV.gather(1, k_S.unsqueeze(1) - 1)

    temperature_S1 = temperature_S.unsqueeze(1).double()
    scaled_SV = (sorted_SV.double() - largest_S1) / temperature_S1.clamp(min=torch.finfo(torch.float32).tiny)
    probs_SV = scaled_SV.masked_fill(sorted_SV < top_k_threshold_S1, float("-inf")).softmax(-1)
    # Equal logits share the mass of what is strictly before the first of them.
    first_SV = torch.searchsorted(-sorted_SV, -sorted_SV)
    before_SV = (probs_SV.cumsum(-1) - probs_SV).gather(1, first_SV)
    top_p_S1 = torch.where(top_p_S < 1, top_p_S.double(), float("inf")).unsqueeze(1)
    kept_SV = (before_SV < top_p_S1) & (sorted_SV >= top_k_threshold_S1)
    kept_SV &= scaled_SV >= min_p_S.unsqueeze(1).double().log()
    kept_SV[:, 0] = True
    threshold_S = sorted_SV.gather(1, kept_SV.sum(-1, keepdim=True) - 1).squeeze(1)
    unfiltered_S = (temperature_S <= 0) | ((top_k_S <= 0) & (top_p_S >= 1) & (min_p_S <= 0))
    return threshold_S.masked_fill(unfiltered_S, float("-inf"))
