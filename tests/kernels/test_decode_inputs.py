import pytest
import torch
from pilotfish.kernels.decode_inputs import (
    NO_NEW_PAGE,
    NUM_DECODE_COLUMNS,
    _gather_decode_inputs_triton,
    gather_decode_inputs,
    gather_decode_inputs_ref,
)

# (rows, slots, tokens a slot, page length)
SMALL = {"one row": (1, 3, 64, 16), "several": (5, 9, 70, 16), "wide": (3, 4, 16 * 300, 16), "long pages": (4, 6, 256, 64)}
LARGE = {"many": (200, 257, 4096, 16)}


def make(num_rows, num_slots, num_tokens, page_len, device="cpu"):
    """Every other row has a new page."""
    columns = torch.empty((NUM_DECODE_COLUMNS, num_rows), dtype=torch.int64)
    slots, positions, output_positions, wants_logits, new_pages = columns
    slots.copy_(torch.randperm(num_slots)[:num_rows])
    positions.random_(num_tokens)
    positions[0] = num_tokens - 1
    output_positions.random_(100)
    wants_logits.random_(2)
    new_pages.random_(1000)
    new_pages[1::2] = NO_NEW_PAGE
    token_ids = torch.randint(1000, (num_slots, num_tokens + 1), dtype=torch.int32)
    tables = torch.randint(1000, (num_slots, -(-num_tokens // page_len)), dtype=torch.int32)
    return [tensor.to(device) for tensor in (columns, token_ids, tables)]


def test_reference_by_hand():
    token_ids = torch.arange(40, dtype=torch.int32).view(2, 20)
    tables = torch.tensor([[7, 8], [3, 5]], dtype=torch.int32)
    columns = torch.tensor([[1, 0], [16, 2], [8, 9], [0, 1], [6, NO_NEW_PAGE]])
    for _ in range(2):  # running it again changes nothing
        inputs = gather_decode_inputs_ref(columns, token_ids, tables, page_len=16)
        assert inputs.columns_5S.tolist() == columns.tolist()
        assert inputs.token_ids_S.tolist() == [36, 2]
        assert inputs.cache_slots_S.tolist() == [6 * 16, 7 * 16 + 2]
        assert inputs.context_lens_S.tolist() == inputs.lengths_S.tolist() == [17, 3]
        assert inputs.block_tables_SB.tolist() == [[3, 6], [7, 8]]
        assert tables.tolist() == [[7, 8], [3, 6]]


def test_kernel_against_the_reference(device, case):
    (columns, token_ids, tables), page_len = make(*case, device), case[3]
    expected_tables = tables.clone()
    expected = gather_decode_inputs_ref(columns, token_ids, expected_tables, page_len=page_len)
    result = _gather_decode_inputs_triton(columns, token_ids, tables, page_len=page_len)
    assert torch.equal(tables, expected_tables)
    for name in ("columns_5S", "token_ids_S", "cache_slots_S", "context_lens_S", "lengths_S"):
        ours, theirs = getattr(result, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    for row, position in enumerate(columns[1].tolist()):
        used = position // page_len + 1
        assert torch.equal(result.block_tables_SB[row, :used], expected.block_tables_SB[row, :used])


@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros((4, 2), dtype=torch.int32)},
        {0: torch.zeros((3, 2), dtype=torch.int64)},
        {0: torch.zeros((2, 4), dtype=torch.int64).T},
        {2: torch.zeros(2, 2).int()},
    ],
)
def test_misfits_are_refused(change):
    tensors = dict(enumerate(make(2, 4, 32, 16)))
    gather_decode_inputs(*tensors.values(), page_len=16)
    with pytest.raises(ValueError, match="gather_decode_inputs"):
        gather_decode_inputs(*(tensors | change).values(), page_len=16)
