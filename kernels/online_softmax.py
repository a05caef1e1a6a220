"""One step of the online softmax, shared by the attention kernels.

M rows (a query and a head each), J keys, D head_dim. Source: Milakov and Gimelshein 2018, "Online normalizer calculation for
softmax"; Dao et al. 2022, "FlashAttention".
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def score_keys(q_MD, k_JD, scale, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    """(score_MJ, unit): the product of both is the score in units of log2, so that exp2 serves. The unit is positive."""
    score_MJ = tl.dot(q_MD, tl.trans(k_JD.to(q_MD.dtype)), input_precision="ieee")
    unit = scale * LOG2_E
    if HAS_SOFT_CAP:
        score_MJ = soft_cap * (2.0 * tl.sigmoid(score_MJ * (2.0 * scale / soft_cap)) - 1.0)
        unit = LOG2_E
    return score_MJ, unit


@triton.jit
def add_keys(score_MJ, unit, v_JD, largest_M, total_M, out_MD, MAY_SEE_NONE: tl.constexpr):
    """(largest, total, out) with J more keys; a score of -inf is a key that is not seen. `largest` is in units of log2.

    MAY_SEE_NONE: a row may have seen no key at all, neither of these nor before.
    """
    # The unit is taken out of the maximum, and the product below is one multiply-add with the difference.
    new_largest_M = tl.maximum(largest_M, tl.max(score_MJ, axis=1) * unit)
    offset_M = new_largest_M
    if MAY_SEE_NONE:  # its offset stays finite: -inf minus -inf is not a number
        offset_M = tl.where(new_largest_M == -float("inf"), 0.0, new_largest_M)
    weight_MJ = tl.exp2(score_MJ * unit - offset_M[:, None])
    rescale_M = tl.exp2(largest_M - offset_M)
    total_M = total_M * rescale_M + tl.sum(weight_MJ, axis=1)
    out_MD = tl.dot(weight_MJ.to(v_JD.dtype), v_JD, out_MD * rescale_M[:, None], input_precision="ieee")
    return new_largest_M, total_M, out_MD


@triton.jit
def attend(q_MD, k_JD, v_JD, seen_MJ, scale, soft_cap, largest_M, total_M, out_MD, HAS_SOFT_CAP: tl.constexpr):
    """(largest, total, out) with those of J more keys that `seen_MJ` names."""
    score_MJ, unit = score_keys(q_MD, k_JD, scale, soft_cap, HAS_SOFT_CAP)
    score_MJ = tl.where(seen_MJ, score_MJ, -float("inf"))
    return add_keys(score_MJ, unit, v_JD.to(q_MD.dtype), largest_M, total_M, out_MD, True)
