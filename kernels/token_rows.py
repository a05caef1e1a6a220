"""Tokens on their way to experts of other ranks: what one token brings is one row, so that one collective moves all of it.

    row   = bits of x [H] | bits of weights [C] | slots [C] | zeros up to a multiple of 16 bytes            int32 [W]
    own   = slot - first   if 0 <= slot - first < num_own, else -1

Rows behind the last token have no activation, no weight and the slot -1 everywhere; so have all slots of padding.

T tokens, N rows, R rows that came from other ranks, C choices, H hidden.
"""

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import kernel_mode
from .own_experts import own_experts_ref

_BLOCK = 1024


def pack_rows(
    x_TH: torch.Tensor,
    weights_TC: torch.Tensor,
    slots_TC: torch.Tensor,
    *,
    num_rows: int,
    is_padding_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """int32 [num_rows, W]. All contiguous; weights float32, slots int32, is_padding bool; ValueError otherwise."""
    _check(x_TH, weights_TC, slots_TC, num_rows, is_padding_T)
    run = pack_rows_triton if x_TH.device.type == "cuda" and kernel_mode() != "ref" else pack_rows_ref
    return run(x_TH, weights_TC, slots_TC, num_rows=num_rows, is_padding_T=is_padding_T)


def unpack_rows(
    rows_RW: torch.Tensor, x_TH: torch.Tensor, num_choices: int, *, first: int, num_own: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x [R, H], a view whose rows lie apart, of the dtype and width of x_TH; weights [R, C]; own slots [R, C] int32)."""
    hidden = _words(x_TH)
    run = unpack_choices_triton if rows_RW.device.type == "cuda" and kernel_mode() != "ref" else unpack_choices_ref
    return rows_RW[:, :hidden].view(x_TH.dtype), *run(rows_RW, hidden, num_choices, first=first, num_own=num_own)


def pack_rows_ref(
    x_TH: torch.Tensor,
    weights_TC: torch.Tensor,
    slots_TC: torch.Tensor,
    *,
    num_rows: int,
    is_padding_T: torch.Tensor | None = None,
) -> torch.Tensor:
    (num_tokens, num_choices), hidden = slots_TC.shape, _words(x_TH)
    rows_NW = slots_TC.new_zeros(num_rows, _width(x_TH, num_choices))
    x_NX, weights_NC, slots_NC, _ = rows_NW.split([hidden, num_choices, num_choices, -(hidden + 2 * num_choices) % 4], dim=1)
    x_NX[:num_tokens] = x_TH.view(torch.int32)
    weights_NC[:num_tokens] = weights_TC.view(torch.int32)
    slots_NC.fill_(-1)
    slots_NC[:num_tokens] = slots_TC if is_padding_T is None else slots_TC.masked_fill(is_padding_T.unsqueeze(1), -1)
    return rows_NW


def unpack_choices_ref(
    rows_RW: torch.Tensor, hidden_words: int, num_choices: int, *, first: int, num_own: int
) -> tuple[torch.Tensor, torch.Tensor]:
    weights_RC, slots_RC = rows_RW[:, hidden_words : hidden_words + 2 * num_choices].split(num_choices, dim=1)
    own_RC = own_experts_ref(slots_RC.contiguous(), first=first, num_own=num_own)
    return weights_RC.contiguous().view(torch.float32), own_RC


@triton.jit
def _pack_rows_kernel(
    x,
    weights,
    slots,
    is_padding,
    rows,
    num_tokens,
    hidden_words,
    width,
    NUM_CHOICES: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and block of its words."""
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    choice = word - hidden_words
    slot_choice = choice - NUM_CHOICES
    is_token = (word < width) & (tl.broadcast_to(row, [BLOCK]) < num_tokens)
    has_weight = (choice >= 0) & (choice < NUM_CHOICES)
    has_slot = (slot_choice >= 0) & (slot_choice < NUM_CHOICES)
    has_expert = is_token
    if HAS_PADDING:
        has_expert = is_token & (tl.load(is_padding + tl.broadcast_to(row, [BLOCK]), is_token, other=1) == 0)
    value = tl.load(x + row * hidden_words + word, is_token & (word < hidden_words), other=0)
    value += tl.load(weights + row * NUM_CHOICES + choice, is_token & has_weight, other=0)
    slot = tl.load(slots + row * NUM_CHOICES + slot_choice, has_expert & has_slot, other=-1)
    tl.store(rows + row * width + word, tl.where(has_slot, slot, value), word < width)


def pack_rows_triton(
    x_TH: torch.Tensor,
    weights_TC: torch.Tensor,
    slots_TC: torch.Tensor,
    *,
    num_rows: int,
    is_padding_T: torch.Tensor | None = None,
) -> torch.Tensor:
    (num_tokens, num_choices), width = slots_TC.shape, _width(x_TH, slots_TC.shape[1])
    rows_NW = slots_TC.new_empty(num_rows, width)
    _pack_rows_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
        x_TH.view(torch.int32),
        weights_TC.view(torch.int32),
        slots_TC,
        slots_TC if is_padding_T is None else is_padding_T.view(torch.int8),
        rows_NW,
        num_tokens,
        _words(x_TH),
        width,
        NUM_CHOICES=num_choices,
        HAS_PADDING=is_padding_T is not None,
        BLOCK=_BLOCK,
        **launch_options(x_TH.device),
    )
    return rows_NW


@triton.jit
def _unpack_choices_kernel(
    rows,
    weights,
    own,
    size,
    hidden_words,
    width,
    first,
    num_own,
    NUM_CHOICES: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = rows + (pair // NUM_CHOICES).to(tl.int64) * width + hidden_words + pair % NUM_CHOICES
    number = tl.load(source + NUM_CHOICES, pair < size, other=-1) - first
    tl.store(weights + pair, tl.load(source, pair < size, other=0), pair < size)
    tl.store(own + pair, tl.where((number >= 0) & (number < num_own), number, -1), pair < size)


def unpack_choices_triton(
    rows_RW: torch.Tensor, hidden_words: int, num_choices: int, *, first: int, num_own: int
) -> tuple[torch.Tensor, torch.Tensor]:
    weights_RC, own_RC = (rows_RW.new_empty(len(rows_RW), num_choices) for _ in range(2))
    if size := own_RC.numel():
        _unpack_choices_kernel[(triton.cdiv(size, _BLOCK),)](
            rows_RW,
            weights_RC,
            own_RC,
            size,
            hidden_words,
            rows_RW.stride(0),
            first,
            num_own,
            NUM_CHOICES=num_choices,
            BLOCK=_BLOCK,
            **launch_options(rows_RW.device),
        )
    return weights_RC.view(torch.float32), own_RC


def _words(x_TH: torch.Tensor) -> int:
    """4-byte words of a row."""
    return x_TH.shape[1] * x_TH.element_size() // 4


def _width(x_TH: torch.Tensor, num_choices: int) -> int:
    num_words = _words(x_TH) + 2 * num_choices
    return num_words + -num_words % 4


def _check(
    x_TH: torch.Tensor,
    weights_TC: torch.Tensor,
    slots_TC: torch.Tensor,
    num_rows: int,
    is_padding_T: torch.Tensor | None,
) -> None:
    if x_TH.dim() != 2 or slots_TC.dim() != 2 or weights_TC.shape != slots_TC.shape or len(x_TH) != len(slots_TC):
        shapes = f"x {tuple(x_TH.shape)}, weights {tuple(weights_TC.shape)}, slots {tuple(slots_TC.shape)}"
        raise ValueError(f"pack_rows: {shapes} must be [T, H], [T, C], [T, C]")
    if weights_TC.dtype != torch.float32 or slots_TC.dtype != torch.int32 or x_TH.shape[1] * x_TH.element_size() % 4:
        raise ValueError(f"pack_rows: weights {weights_TC.dtype} must be float32, slots {slots_TC.dtype} int32, H even")
    if not (x_TH.is_contiguous() and weights_TC.is_contiguous() and slots_TC.is_contiguous()):
        raise ValueError("pack_rows: x, weights and slots must be contiguous")
    if num_rows < len(x_TH):
        raise ValueError(f"pack_rows: {num_rows} rows for {len(x_TH)} tokens")
    if is_padding_T is not None and (is_padding_T.dtype != torch.bool or is_padding_T.shape != x_TH.shape[:1]):
        raise ValueError(f"pack_rows: is_padding {tuple(is_padding_T.shape)} {is_padding_T.dtype} must be bool [T]")
