"""Which tokens may be drawn: top-k, top-p and min-p, as one threshold on a row's logits.

With p = softmax(logits / temperature), in the order of Hugging Face's warpers, each on what the one before kept:

    top_k   keeps the k largest logits, and those equal to the k-th             off where k <= 0
    top_p   keeps a token if all strictly likelier ones have less than top_p    off where top_p >= 1
    min_p   keeps a token if its p is at least min_p times the largest p        off where min_p <= 0

All three cut a row at a value of its logits, so that what is kept is {logit >= threshold}; ties are kept or dropped
together, and the largest logit is always kept. Temperature 0 (greedy) filters nothing.

On a GPU nothing is sorted: a bound from a summary of the row leaves a short list of candidates, in which the threshold is
found by bisection of its bits. The parts of that are here, the kernels in sampling.py.

S rows, V vocabulary. Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
"""

import torch
import triton
import triton.language as tl

# A chunk's ladder is its masses from `largest - rung * _RUNG * temperature` up, for each rung.
NUM_RUNGS = tl.constexpr(24)
_RUNG = tl.constexpr(0.5)


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
def is_filtered(temperature, top_k, top_p, min_p):
    return (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))


@triton.jit
def _flip(bits):
    """From the bits of a float32 to an int32 key in the same order, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _mass_at_least(values, num_values, threshold, largest, temperature, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Of the values from `threshold` up: their number, or the sum of exp((value - largest) / temperature).

    The order of summation is fixed and rounding is monotone, so that the mass never grows with the threshold.
    """
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_values, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(values + column, column < num_values, other=-float("inf"))
        kept = (column < num_values) & (logits >= threshold)
        if COUNT:
            mass += kept.to(tl.float32)
        else:
            mass += tl.where(kept, tl.exp((logits - largest) / temperature), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _largest_with_mass(values, num_values, target, lowest, largest, temperature, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest number from `lowest` to `largest` that has a mass of `target` at or above it; `lowest` if none has.

    Its key is built bit by bit from the top, in 32 passes at most: none for the bits that lowest and largest have in common.
    `biased` is the key with its sign bit turned, so that a set bit always means a larger key.
    """
    sign: tl.constexpr = -0x80000000
    lowest_key, largest_key = _flip(lowest.to(tl.int32, bitcast=True)), _flip(largest.to(tl.int32, bitcast=True))
    one = tl.full([], 1, tl.int32)
    biased = tl.full([], 0, tl.int32)
    for step in range(32):
        candidate = biased | (one << (31 - step))
        key = candidate ^ sign
        if key <= lowest_key:
            biased = candidate
        elif key <= largest_key:
            threshold = _flip(key).to(tl.float32, bitcast=True)
            if _mass_at_least(values, num_values, threshold, largest, temperature, COUNT, BLOCK) >= target:
                biased = candidate
    return _flip(biased ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def min_p_threshold(largest, temperature, min_p):
    return tl.minimum(largest + temperature * tl.log(min_p), largest)


@triton.jit
def _store_ladder(ladder, logits, masses, largest, temperature):
    for rung in range(NUM_RUNGS):
        above = logits >= largest - rung * _RUNG * temperature
        tl.store(ladder + rung, tl.sum(tl.where(above, masses, 0.0), axis=0))


@triton.jit
def summarize_chunk(logits_C, temperature, top_k, top_p, out, chunk_scores, chunk_masses, ladders):
    """Of chunk `out` its largest logit, its mass and, for top_p alone, its ladder."""
    largest = tl.max(logits_C, axis=0)
    tl.store(chunk_scores + out, largest)
    offset = tl.where(largest == -float("inf"), 0.0, largest)  # -inf minus -inf is not a number
    masses = tl.exp((logits_C - offset) / temperature)
    tl.store(chunk_masses + out, tl.sum(masses, axis=0))
    if (top_k <= 0) & (top_p < 1):
        _store_ladder(ladders + out * NUM_RUNGS, logits_C, masses, offset, temperature)


@triton.jit
def _ladder_bound(scores, ladder_rows, largest, target, temperature):
    """The largest of a grid of numbers that surely has a mass of `target` at or above it; -inf if none of the grid has.

    Of each chunk counts what its ladder has down to the last rung that is not below the number.
    """
    grid_step = temperature * (_RUNG / 4)
    first, end = tl.full([], 0, tl.int32), tl.full([], 4 * NUM_RUNGS, tl.int32)
    while first < end:  # the first number that has the mass
        middle = (first + end) // 2
        number = largest - middle * grid_step
        reaches = scores >= number
        rung = tl.where(reaches, (scores - number) / (temperature * _RUNG), 0.0).to(tl.int32)
        rung = tl.minimum(tl.maximum(rung, 0), NUM_RUNGS - 1)
        mass = tl.load(ladder_rows + rung, reaches, other=0.0) * tl.exp((scores - largest) / temperature)
        if tl.sum(tl.where(reaches, mass, 0.0), axis=0) >= target:
            end = middle
        else:
            first = middle + 1
    number = largest - first * grid_step
    rounding = 0.01 * grid_step + 1e-6 * (tl.abs(number) + tl.abs(largest))
    return tl.where(first < 4 * NUM_RUNGS, number - rounding, -float("inf"))


@triton.jit
def lower_bound(
    chunk_largest, ladders, num_chunks, vocab, largest, total, temperature, top_k, top_p, min_p, BLOCK: tl.constexpr
):
    """A number that no threshold of this row is below, from its chunks' largest logits and its `total` mass.

    top_k: k of the chunks' largest logits are k of the row's. top_p: the chunks' ladders; or, were all tokens
    below the bound as likely as it, they had the mass 1 - top_p together.
    """
    bound = tl.full([], -float("inf"), tl.float32)
    if top_k > 0:
        bound = _largest_with_mass(chunk_largest, num_chunks, top_k.to(tl.float32), bound, largest, temperature, True, BLOCK)
    elif top_p < 1:
        bound = tl.minimum(largest + temperature * tl.log((1 - top_p) * total / vocab), largest)
        chunk = tl.arange(0, BLOCK)
        scores = tl.load(chunk_largest + chunk, chunk < num_chunks, other=-float("inf"))
        target = top_p * total * 1.00001  # sums in another order may be this much smaller
        bound = tl.maximum(bound, _ladder_bound(scores, ladders + chunk * NUM_RUNGS, largest, target, temperature))
    else:
        bound = min_p_threshold(largest, temperature, min_p)
    return bound


@triton.jit
def gather_candidates(row, vocab, bound, candidates, candidate_tokens, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the logits from `bound` up and their tokens, in the order of the row, as far as they fit; returns their number."""
    num_found = tl.full([], 0, tl.int32)
    token = tl.arange(0, BLOCK)
    following = tl.load(row + token, token < vocab, other=-float("inf"))
    for start in range(0, vocab, BLOCK):
        token, values = start + tl.arange(0, BLOCK), following
        following = tl.load(row + token + BLOCK, token + BLOCK < vocab, other=-float("inf"))  # on its way meanwhile
        kept = (token < vocab) & (values >= bound)
        num_kept = tl.sum(kept.to(tl.int32), axis=0)
        if (num_kept > 0) & (num_found < CAPACITY):
            place = num_found + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            fits = kept & (place < CAPACITY)
            tl.store(candidates + place, values, fits)
            tl.store(candidate_tokens + place, token, fits)
        num_found += num_kept
    tl.debug_barrier()  # other threads of the program read them next
    return num_found


@triton.jit
def keep_threshold(values, num_values, bound, largest, total, temperature, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """The threshold, where `values` are the row's logits from `bound` up."""
    threshold = bound
    if top_k > 0:
        threshold = _largest_with_mass(values, num_values, top_k.to(tl.float32), bound, largest, temperature, True, BLOCK)
        if top_p < 1:
            total = _mass_at_least(values, num_values, threshold, largest, temperature, False, BLOCK)
    if top_p < 1:
        threshold = _largest_with_mass(values, num_values, top_p * total, threshold, largest, temperature, False, BLOCK)
    if min_p > 0:
        threshold = tl.maximum(threshold, min_p_threshold(largest, temperature, min_p))
    return threshold
