import pytest
import torch
from pilotfish.kernels.decode_inputs import _gather_decode_inputs_triton, gather_decode_inputs, gather_decode_inputs_ref

# (rows, slots, tokens a slot, page length)
SMALL = {"one row": (1, 3, 64, 16), "several": (5, 9, 70, 16), "wide": (3, 4, 16 * 300, 16), "long pages": (4, 6, 256, 64)}
LARGE = {"many": (200, 257, 4096, 16)}


def make(num_rows, num_slots, num_tokens, page_len, device="cpu"):
    slots = torch.randperm(num_slots)[:num_rows]
    positions = torch.randint(num_tokens, (num_rows,))
    positions[0] = num_tokens - 1
    token_ids = torch.randint(1000, (num_slots, num_tokens + 1), dtype=torch.int32)
    tables = torch.randint(1000, (num_slots, -(-num_tokens // page_len)), dtype=torch.int32)
    return [tensor.to(device) for tensor in (slots, positions, token_ids, tables)]


def test_reference_by_hand():
    token_ids = torch.arange(40, dtype=torch.int32).view(2, 20)
    tables = torch.tensor([[7, 8], [3, 5]], dtype=torch.int32)
    inputs = gather_decode_inputs_ref(torch.tensor([1, 0]), torch.tensor([17, 2]), token_ids, tables, page_len=16)
    assert inputs.token_ids_S.tolist() == [37, 2]
    assert inputs.cache_slots_S.tolist() == [5 * 16 + 1, 7 * 16 + 2]
    assert inputs.context_lens_S.tolist() == inputs.lengths_S.tolist() == [18, 3]
    assert inputs.block_tables_SB.tolist() == [[3, 5], [7, 8]]


def test_kernel_against_the_reference(device, case):
    tensors, page_len = make(*case, device), case[3]
    expected = gather_decode_inputs_ref(*tensors, page_len=page_len)
    result = _gather_decode_inputs_triton(*tensors, page_len=page_len)
    for name in ("token_ids_S", "cache_slots_S", "context_lens_S", "lengths_S"):
        ours, theirs = getattr(result, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    for row, position in enumerate(tensors[1].tolist()):
        used = position // page_len + 1
        assert torch.equal(result.block_tables_SB[row, :used], expected.block_tables_SB[row, :used])


@pytest.mark.parametrize(
    "change", [{0: torch.zeros(2, dtype=torch.int32)}, {1: torch.zeros(3, dtype=torch.int64)}, {3: torch.zeros(2, 2).int()}]
)
def test_misfits_are_refused(change):
    tensors = dict(enumerate(make(2, 4, 32, 16)))
    gather_decode_inputs(*tensors.values(), page_len=16)
    with pytest.raises(ValueError, match="gather_decode_inputs"):
        gather_decode_inputs(*(tensors | change).values(), page_len=16)
