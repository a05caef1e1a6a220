"""What a decode step reads of the slots' state, gathered by the device: one token a row.

    token_id = token_ids[slot, position],   cache_slot = block_tables[slot, position // L] * L + position % L

S rows, M slots, C tokens a slot, B blocks a slot, L page length.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, wait_for_previous
from .dispatch import choose_backend


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Block tables are filled as far as a row's context reaches; what is behind is not defined."""

    token_ids_S: torch.Tensor  # int64
    cache_slots_S: torch.Tensor  # int64
    block_tables_SB: torch.Tensor  # int32
    context_lens_S: torch.Tensor  # int32, the row's token included
    lengths_S: torch.Tensor  # int64, the same


def gather_decode_inputs(
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    token_ids_MC: torch.Tensor,
    block_tables_MB: torch.Tensor,
    *,
    page_len: int,
) -> DecodeInputs:
    """Slots and positions int64, contiguous, within M and C (not checked on the device); tables int32, contiguous."""
    _check(slots_S, positions_S, token_ids_MC, block_tables_MB)
    run = gather_decode_inputs_ref
    if choose_backend("gather_decode_inputs", slots_S, token_ids_MC, block_tables_MB) == "triton":
        run = _gather_decode_inputs_triton
    return run(slots_S, positions_S, token_ids_MC, block_tables_MB, page_len=page_len)


def gather_decode_inputs_ref(
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    token_ids_MC: torch.Tensor,
    block_tables_MB: torch.Tensor,
    *,
    page_len: int,
) -> DecodeInputs:
    block_tables_SB = block_tables_MB.index_select(0, slots_S)
    pages_S = block_tables_SB.gather(1, (positions_S // page_len).unsqueeze(1)).squeeze(1)
    lengths_S = positions_S + 1
    return DecodeInputs(
        token_ids_S=token_ids_MC[slots_S, positions_S].long(),
        cache_slots_S=torch.add(positions_S % page_len, pages_S, alpha=page_len),
        block_tables_SB=block_tables_SB,
        context_lens_S=lengths_S.int(),
        lengths_S=lengths_S,
    )


# Read a number at a time: a second compilation for another alignment would gain nothing.
@triton.jit(do_not_specialize_on_alignment=["slots", "positions"])
def _gather_kernel(
    slots,
    positions,
    token_ids,
    block_tables,
    out_token_ids,
    out_cache_slots,
    out_block_tables,
    out_context_lens,
    out_lengths,
    num_columns,
    num_blocks,
    PAGE_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    """One program a row."""
    # The next kernel starts at this one's end: all later ones of the step may read what is written here before they wait.
    wait_for_previous(EARLY_START)
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    tl.store(out_token_ids + row, tl.load(token_ids + slot * num_columns + position).to(tl.int64))
    page = tl.load(block_tables + slot * num_blocks + position // PAGE_LEN).to(tl.int64)
    tl.store(out_cache_slots + row, page * PAGE_LEN + position % PAGE_LEN)
    tl.store(out_context_lens + row, (position + 1).to(tl.int32))
    tl.store(out_lengths + row, position + 1)
    for start in range(0, position // PAGE_LEN + 1, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = block < num_blocks
        entries = tl.load(block_tables + slot * num_blocks + block, inside, other=0)
        tl.store(out_block_tables + row * num_blocks + block, entries, inside)


def _gather_decode_inputs_triton(
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    token_ids_MC: torch.Tensor,
    block_tables_MB: torch.Tensor,
    *,
    page_len: int,
) -> DecodeInputs:
    num_rows, num_blocks = slots_S.shape[0], block_tables_MB.shape[1]
    inputs = DecodeInputs(
        token_ids_S=torch.empty_like(slots_S),
        cache_slots_S=torch.empty_like(slots_S),
        block_tables_SB=torch.empty((num_rows, num_blocks), dtype=torch.int32, device=slots_S.device),
        context_lens_S=torch.empty_like(slots_S, dtype=torch.int32),
        lengths_S=torch.empty_like(slots_S),
    )
    if num_rows:
        _gather_kernel[(num_rows,)](
            slots_S,
            positions_S,
            token_ids_MC,
            block_tables_MB,
            inputs.token_ids_S,
            inputs.cache_slots_S,
            inputs.block_tables_SB,
            inputs.context_lens_S,
            inputs.lengths_S,
            token_ids_MC.shape[1],
            num_blocks,
            PAGE_LEN=page_len,
            BLOCK=128,
            num_warps=1,
            **launch_options(slots_S.device),
        )
    return inputs


def _check(*tensors: torch.Tensor) -> None:
    slots_S, positions_S, token_ids_MC, block_tables_MB = tensors
    if slots_S.dim() != 1 or positions_S.shape != slots_S.shape:
        raise ValueError(f"gather_decode_inputs: slots {tuple(slots_S.shape)} and positions {tuple(positions_S.shape)} differ")
    if token_ids_MC.dim() != 2 or block_tables_MB.dim() != 2 or len(token_ids_MC) != len(block_tables_MB):
        raise ValueError("gather_decode_inputs: token ids and block tables must be [slots, ...] of the same slots")
    if (slots_S.dtype, positions_S.dtype) != (torch.int64,) * 2 or (token_ids_MC.dtype, block_tables_MB.dtype) != (
        torch.int32,
    ) * 2:
        raise ValueError("gather_decode_inputs: slots and positions must be int64, the tables int32")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("gather_decode_inputs: all tensors must be contiguous")
