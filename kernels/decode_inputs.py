"""What a decode step reads of the slots' state, gathered by the device: one token a row.

    token_id = token_ids[slot, position],   cache_slot = block_tables[slot, position // L] * L + position % L

Columns say what is wanted: the slot and the position of each row, the number of the output it draws and whether its logits are
wanted (neither is read here), and the page that the token is the first of, else -1. A new page is written to
block_tables[slot, position // L] before that is read.

S rows, M slots, C tokens a slot, B blocks a slot, L page length.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, wait_for_previous
from .dispatch import choose_backend

NUM_DECODE_COLUMNS = 5
NO_NEW_PAGE = -1
_SLOT, _POSITION, _, _, _NEW_PAGE = range(NUM_DECODE_COLUMNS)


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Block tables are filled as far as a row's context reaches; what is behind is not defined."""

    columns_5S: torch.Tensor  # a copy: those of the next step may come while this one still reads its own
    token_ids_S: torch.Tensor  # int64
    cache_slots_S: torch.Tensor  # int64
    block_tables_SB: torch.Tensor  # int32
    context_lens_S: torch.Tensor  # int32, the row's token included
    lengths_S: torch.Tensor  # int64, the same


def gather_decode_inputs(
    columns_5S: torch.Tensor,
    token_ids_MC: torch.Tensor,
    block_tables_MB: torch.Tensor,
    *,
    page_len: int,
) -> DecodeInputs:
    """Columns int64, contiguous, slots and positions within M and C (not checked on the device); tables int32, contiguous.

    Running it again changes nothing. Rows with a new page have slots of their own.
    """
    _check(columns_5S, token_ids_MC, block_tables_MB)
    run = gather_decode_inputs_ref  # on a CPU always: what gathers there is a data rank without rows, a single one of padding
    tensors = (columns_5S, token_ids_MC, block_tables_MB)
    if columns_5S.device.type == "cuda" and choose_backend("gather_decode_inputs", *tensors) == "triton":
        run = _gather_decode_inputs_triton
    return run(*tensors, page_len=page_len)


def gather_decode_inputs_ref(
    columns_5S: torch.Tensor,
    token_ids_MC: torch.Tensor,
    block_tables_MB: torch.Tensor,
    *,
    page_len: int,
) -> DecodeInputs:
    slots_S, positions_S, new_pages_S = columns_5S[_SLOT], columns_5S[_POSITION], columns_5S[_NEW_PAGE]
    blocks_S = positions_S // page_len
    pages_S = torch.where(new_pages_S < 0, block_tables_MB[slots_S, blocks_S], new_pages_S.int())
    block_tables_MB.index_put_((slots_S, blocks_S), pages_S)
    lengths_S = positions_S + 1
    return DecodeInputs(
        columns_5S=columns_5S.clone(),
        token_ids_S=token_ids_MC[slots_S, positions_S].long(),
        cache_slots_S=torch.add(positions_S % page_len, pages_S, alpha=page_len),
        block_tables_SB=block_tables_MB.index_select(0, slots_S),
        context_lens_S=lengths_S.int(),
        lengths_S=lengths_S,
    )


# Read a number at a time: a second compilation for another alignment would gain nothing.
@triton.jit(do_not_specialize_on_alignment=["columns"])
def _gather_kernel(
    columns,
    token_ids,
    block_tables,
    out_columns,
    out_token_ids,
    out_cache_slots,
    out_block_tables,
    out_context_lens,
    out_lengths,
    num_columns,
    num_blocks,
    NUM_COLUMNS: tl.constexpr,
    SLOT: tl.constexpr,
    POSITION: tl.constexpr,
    NEW_PAGE: tl.constexpr,
    PAGE_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    """One program a row."""
    # The next kernel starts at this one's end: all later ones of the step may read what is written here before they wait.
    wait_for_previous(EARLY_START)
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0)
    for column in tl.static_range(NUM_COLUMNS):
        tl.store(out_columns + column * num_rows + row, tl.load(columns + column * num_rows + row))
    slot, position = tl.load(columns + SLOT * num_rows + row), tl.load(columns + POSITION * num_rows + row)
    new_page = tl.load(columns + NEW_PAGE * num_rows + row).to(tl.int32)
    tl.store(out_token_ids + row, tl.load(token_ids + slot * num_columns + position).to(tl.int64))
    table, last = block_tables + slot * num_blocks, position // PAGE_LEN
    page = tl.where(new_page < 0, tl.load(table + last), new_page)
    tl.store(table + last, page, new_page >= 0)
    tl.store(out_cache_slots + row, page.to(tl.int64) * PAGE_LEN + position % PAGE_LEN)
    tl.store(out_context_lens + row, (position + 1).to(tl.int32))
    tl.store(out_lengths + row, position + 1)
    for start in range(0, last + 1, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = block < num_blocks
        pages = tl.load(table + block, inside, other=0)
        pages = tl.where(block == last, page, pages)  # what one thread has just stored the others may not see
        tl.store(out_block_tables + row * num_blocks + block, pages, inside)


def _gather_decode_inputs_triton(
    columns_5S: torch.Tensor,
    token_ids_MC: torch.Tensor,
    block_tables_MB: torch.Tensor,
    *,
    page_len: int,
) -> DecodeInputs:
    num_rows, num_blocks = columns_5S.shape[1], block_tables_MB.shape[1]
    inputs = DecodeInputs(
        columns_5S=torch.empty_like(columns_5S),
        token_ids_S=columns_5S.new_empty(num_rows),
        cache_slots_S=columns_5S.new_empty(num_rows),
        block_tables_SB=block_tables_MB.new_empty(num_rows, num_blocks),
        context_lens_S=block_tables_MB.new_empty(num_rows),
        lengths_S=columns_5S.new_empty(num_rows),
    )
    if num_rows:
        _gather_kernel[(num_rows,)](
            columns_5S,
            token_ids_MC,
            block_tables_MB,
            inputs.columns_5S,
            inputs.token_ids_S,
            inputs.cache_slots_S,
            inputs.block_tables_SB,
            inputs.context_lens_S,
            inputs.lengths_S,
            token_ids_MC.shape[1],
            num_blocks,
            NUM_COLUMNS=NUM_DECODE_COLUMNS,
            SLOT=_SLOT,
            POSITION=_POSITION,
            NEW_PAGE=_NEW_PAGE,
            PAGE_LEN=page_len,
            BLOCK=128,
            num_warps=1,
            **launch_options(columns_5S.device),
        )
    return inputs


def _check(columns_5S: torch.Tensor, token_ids_MC: torch.Tensor, block_tables_MB: torch.Tensor) -> None:
    if columns_5S.dim() != 2 or len(columns_5S) != NUM_DECODE_COLUMNS:
        raise ValueError(f"gather_decode_inputs: columns {tuple(columns_5S.shape)} must be [{NUM_DECODE_COLUMNS}, rows]")
    if token_ids_MC.dim() != 2 or block_tables_MB.dim() != 2 or len(token_ids_MC) != len(block_tables_MB):
        raise ValueError("gather_decode_inputs: token ids and block tables must be [slots, ...] of the same slots")
    if columns_5S.dtype != torch.int64 or (token_ids_MC.dtype, block_tables_MB.dtype) != (torch.int32,) * 2:
        raise ValueError("gather_decode_inputs: columns must be int64, the tables int32")
    if not all(tensor.is_contiguous() for tensor in (columns_5S, token_ids_MC, block_tables_MB)):
        raise ValueError("gather_decode_inputs: all tensors must be contiguous")
