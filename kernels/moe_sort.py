"""Sorts the (token, choice) pairs of a mixture-of-experts layer by expert, in one launch that reads nothing on the host.

A pair is one choice of one token: pair = token * C + choice. The order is stable, so that runs repeat bit by bit. Pairs whose
expert id is negative belong to another rank and to no expert here: they are left out.

    pairs[expert_starts[e] : expert_starts[e + 1]] = the pairs of expert e, ascending

T tokens, C choices a token, E experts, P = T * C pairs.
"""

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, wait_for_previous


def sort_pairs(experts_TC: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs [P] int32, expert_starts [E + 1] int32). What lies in `pairs` beyond expert_starts[E] is unset.

    `experts_TC` int32, contiguous.
    """
    num_pairs = experts_TC.numel()
    pairs_P = torch.empty(num_pairs, dtype=torch.int32, device=experts_TC.device)
    expert_starts = torch.empty(num_experts + 1, dtype=torch.int32, device=experts_TC.device)
    block = min(max(triton.next_power_of_2(num_pairs), 32), 8192)
    _sort_pairs_kernel[(num_experts + 1,)](
        experts_TC,
        pairs_P,
        expert_starts,
        num_pairs,
        num_experts,
        BLOCK=block,
        num_warps=min(max(block // 128, 1), 32),
        **launch_options(experts_TC.device),
    )
    return pairs_P, expert_starts


def sort_pairs_ref(experts_TC: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids_P = experts_TC.flatten().long()
    boundaries = torch.arange(num_experts + 1, device=ids_P.device)
    sorted_ids, pairs_P = ids_P.sort(stable=True)
    num_left_out = (ids_P < 0).sum()
    return pairs_P[num_left_out:].to(torch.int32), (torch.searchsorted(sorted_ids, boundaries) - num_left_out).to(torch.int32)


@triton.jit
def _sort_pairs_kernel(experts, pairs, expert_starts, num_pairs, num_experts, EARLY_START: tl.constexpr, BLOCK: tl.constexpr):
    """One program an expert, and one for the end: each counts the pairs before its own and then writes its own in order.

    All read all ids: they lie in L2, and no program waits for another.
    """
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    num_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        ids = tl.load(experts + start + lane, start + lane < num_pairs, other=-1)
        num_before += ((ids >= 0) & (ids < expert)).to(tl.int32)
    position = tl.sum(num_before, axis=0)
    tl.store(expert_starts + expert, position)
    if expert == num_experts:
        return
    for start in range(0, num_pairs, BLOCK):
        ids = tl.load(experts + start + lane, start + lane < num_pairs, other=-1)
        mine = (ids == expert).to(tl.int32)
        tl.store(pairs + position + tl.cumsum(mine, axis=0) - mine, start + lane, mine != 0)
        position += tl.sum(mine, axis=0)
