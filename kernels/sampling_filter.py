"""Which tokens may be drawn: top-k, top-p and min-p, as one threshold on a row's logits.

With p = softmax(logits / temperature), in the order of Hugging Face's warpers, each on what the one before kept:

    top_k   keeps the k largest logits, and those equal to the k-th             off where k <= 0
    top_p   keeps a token if all strictly likelier ones have less than top_p    off where top_p >= 1
    min_p   keeps a token if its p is at least min_p times the largest p        off where min_p <= 0

All three cut a row at a value of its logits, so that what is kept is {logit >= threshold}; ties are kept or dropped
together, and the largest logit is always kept. Temperature 0 (greedy) filters nothing.

S rows, V vocabulary. Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
"""

import torch
import triton
import triton.language as tl


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
    first_SV = torch.searchsorted(-sorted_SV, -sorted_SV).clamp(max=vocab - 1)  # a NaN is found at the end
    before_SV = (probs_SV.cumsum(-1) - probs_SV).gather(1, first_SV)
    top_p_S1 = torch.where(top_p_S < 1, top_p_S.double(), float("inf")).unsqueeze(1)
    kept_SV = (before_SV < top_p_S1) & (sorted_SV >= top_k_threshold_S1)
    kept_SV &= scaled_SV >= min_p_S.unsqueeze(1).double().log()
    kept_SV[:, 0] = True
    threshold_S = sorted_SV.gather(1, kept_SV.sum(-1, keepdim=True) - 1).squeeze(1)
    unfiltered_S = (temperature_S <= 0) | ((top_k_S <= 0) & (top_p_S >= 1) & (min_p_S <= 0))
    return threshold_S.masked_fill(unfiltered_S, float("-inf"))


@triton.jit
def _ordered_keys(values):
    """int32 keys in the order of float32 values; its own inverse on the bits."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _mass_at_least(row, vocab, key, largest, temperature, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Over the logits whose key is at least `key`: their number, or the sum of exp((logit - largest) / temperature).

    The order of summation is fixed and rounding is monotone, so that the mass never grows with the key.
    """
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(row + column, column < vocab, other=-float("inf"))
        kept = (column < vocab) & (_ordered_keys(logits) >= key)
        if COUNT:
            mass += kept.to(tl.float32)
        else:
            mass += tl.where(kept, tl.exp((logits - largest) / temperature), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _largest_key_with_mass(row, vocab, target, lowest_key, largest, temperature, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key that has a mass of `target` at or above it, between lowest_key and the key of `largest`.

    Built bit by bit from the top, in 32 passes over the row at most. `biased` is the key with its sign bit turned, so that
    a set bit always means a larger key.
    """
    sign: tl.constexpr = -0x80000000
    largest_key = _ordered_keys(largest)
    one = tl.full([], 1, tl.int32)
    biased = tl.full([], 0, tl.int32)
    for step in range(32):
        candidate = biased | (one << (31 - step))
        key = candidate ^ sign
        if key <= lowest_key:
            biased = candidate
        elif key <= largest_key:  # noqa: SIM102 - `and` would run the pass over the row in any case
            if _mass_at_least(row, vocab, key, largest, temperature, COUNT, BLOCK) >= target:
                biased = candidate
    return biased ^ sign


@triton.jit
def _keep_threshold_kernel(logits, temperatures, top_ks, top_ps, min_ps, thresholds, vocab, stride_logits, BLOCK: tl.constexpr):
    """One program a row; a row without a filter costs nothing."""
    program = tl.program_id(0).to(tl.int64)
    row = logits + program * stride_logits
    temperature = tl.load(temperatures + program)
    top_k, top_p, min_p = tl.load(top_ks + program), tl.load(top_ps + program), tl.load(min_ps + program)
    threshold = tl.full([], -float("inf"), tl.float32)
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        maxima = tl.full([BLOCK], -float("inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            maxima = tl.maximum(maxima, tl.load(row + column, column < vocab, other=-float("inf")))
        largest = tl.max(maxima, axis=0)
        key = _ordered_keys(threshold)
        if top_k > 0:
            key = _largest_key_with_mass(row, vocab, top_k.to(tl.float32), key, largest, temperature, True, BLOCK)
        if top_p < 1:
            total = _mass_at_least(row, vocab, key, largest, temperature, False, BLOCK)
            key = _largest_key_with_mass(row, vocab, top_p * total, key, largest, temperature, False, BLOCK)
        threshold = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
        if min_p > 0:
            threshold = tl.maximum(threshold, tl.minimum(largest + temperature * tl.log(min_p), largest))
    tl.store(thresholds + program, threshold)


def keep_threshold_triton(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
) -> torch.Tensor:
    """The same threshold without a sort and without asking the device which rows have a filter."""
    num_rows, vocab = logits_SV.shape
    threshold_S = torch.empty_like(temperature_S)
    if num_rows > 0:
        _keep_threshold_kernel[(num_rows,)](
            logits_SV,
            temperature_S,
            top_k_S,
            top_p_S,
            min_p_S,
            threshold_S,
            vocab,
            logits_SV.stride(0),
            BLOCK=min(triton.next_power_of_2(vocab), 8192),
            num_warps=16,
        )
    return threshold_S
