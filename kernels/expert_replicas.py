"""Sends each choice of an expert to one of the slots that hold a copy of it, and counts what experts get.

    slot[t, c] = copies[e, 1 + (t + first_turn) mod copies[e, 0]]   with e = experts[t, c]; -1 where e is negative or t padding
    loads[e]  += 1 for each of these choices of e but those of padding

So the copies of an expert take turns by row: all ranks that see the same rows agree without a word, and a row's tokens go
the same way however often it runs. Ranks with few rows of their own begin at turns of their own. The table is read where it
lies: whoever writes another into it redirects captured graphs.

T tokens, C choices, E experts, N columns of the table: 1 + the most copies that an expert may have.
"""

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import choose_backend


def choose_replicas(
    experts_TC: torch.Tensor,
    copies_EN: torch.Tensor,
    loads_E: torch.Tensor,
    *,
    first_turn: int = 0,
    is_padding_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slots int32 [T, C]; adds to `loads` int64.

    `experts` int32 below E (not checked on the device), `copies` int32: in each row their number, from 1, then their slots.
    `is_padding` bool; None where there is none. ValueError where shapes or dtypes do not fit.
    """
    num_experts = copies_EN.shape[0]
    if experts_TC.dim() != 2 or copies_EN.dim() != 2 or copies_EN.shape[1] < 2 or loads_E.shape != (num_experts,):
        raise ValueError(
            f"choose_replicas: experts {tuple(experts_TC.shape)}, copies {tuple(copies_EN.shape)} and loads "
            f"{tuple(loads_E.shape)} must be [T, C], [E, 1 + copies] and [E]"
        )
    if experts_TC.dtype != torch.int32 or copies_EN.dtype != torch.int32 or loads_E.dtype != torch.int64:
        raise ValueError(
            f"choose_replicas: experts and copies must be int32, loads int64: {experts_TC.dtype}, {copies_EN.dtype}, "
            f"{loads_E.dtype}"
        )
    if not all(x.is_contiguous() for x in (experts_TC, copies_EN, loads_E)):
        raise ValueError("choose_replicas: experts, copies and loads must be contiguous")
    if is_padding_T is not None and (is_padding_T.dtype != torch.bool or is_padding_T.shape != experts_TC.shape[:1]):
        raise ValueError(f"choose_replicas: is_padding {tuple(is_padding_T.shape)} {is_padding_T.dtype} must be bool [T]")
    if choose_backend("choose_replicas", experts_TC, copies_EN, loads_E) == "triton":
        return _choose_replicas_triton(experts_TC, copies_EN, loads_E, first_turn=first_turn, is_padding_T=is_padding_T)
    return choose_replicas_ref(experts_TC, copies_EN, loads_E, first_turn=first_turn, is_padding_T=is_padding_T)


def choose_replicas_ref(
    experts_TC: torch.Tensor,
    copies_EN: torch.Tensor,
    loads_E: torch.Tensor,
    *,
    first_turn: int = 0,
    is_padding_T: torch.Tensor | None = None,
) -> torch.Tensor:
    is_chosen_TC = experts_TC >= 0
    if is_padding_T is not None:
        is_chosen_TC &= ~is_padding_T[:, None]
    ids_TC = experts_TC.long().clamp(min=0)
    loads_E.scatter_add_(0, ids_TC.flatten(), is_chosen_TC.flatten().to(loads_E.dtype))
    row_T1 = torch.arange(experts_TC.shape[0], device=experts_TC.device)[:, None]
    turn_TC = (row_T1 + first_turn) % copies_EN[:, 0][ids_TC]
    return torch.where(is_chosen_TC, copies_EN[ids_TC, 1 + turn_TC], -1)


@triton.jit
def _choose_replicas_kernel(
    experts,
    copies,
    loads,
    slots,
    is_padding,
    num_pairs,
    first_turn,
    NUM_CHOICES: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program BLOCK pairs of a token and a choice."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    token = pair // NUM_CHOICES
    expert = tl.load(experts + pair, inside, other=-1)
    is_chosen = expert >= 0
    if HAS_PADDING:
        is_chosen &= tl.load(is_padding + token, inside, other=1) == 0
    row = copies + expert.to(tl.int64) * NUM_COLUMNS
    num_copies = tl.load(row, is_chosen, other=1)
    slot = tl.load(row + 1 + (token + first_turn) % num_copies, is_chosen, other=-1)
    tl.store(slots + pair, slot, inside)
    tl.atomic_add(loads + expert, tl.full([BLOCK], 1, tl.int64), is_chosen, sem="relaxed")


def _choose_replicas_triton(
    experts_TC: torch.Tensor,
    copies_EN: torch.Tensor,
    loads_E: torch.Tensor,
    *,
    first_turn: int = 0,
    is_padding_T: torch.Tensor | None = None,
) -> torch.Tensor:
    slots_TC, num_pairs = torch.empty_like(experts_TC), experts_TC.numel()
    if num_pairs > 0:
        block = min(max(triton.next_power_of_2(num_pairs), 32), 1024)
        _choose_replicas_kernel[(triton.cdiv(num_pairs, block),)](
            experts_TC,
            copies_EN,
            loads_E,
            slots_TC,
            experts_TC if is_padding_T is None else is_padding_T.view(torch.int8),
            num_pairs,
            first_turn,
            NUM_CHOICES=experts_TC.shape[1],
            NUM_COLUMNS=copies_EN.shape[1],
            HAS_PADDING=is_padding_T is not None,
            BLOCK=block,
            num_warps=min(block // 32, 4),
            **launch_options(experts_TC.device),
        )
    return slots_TC
