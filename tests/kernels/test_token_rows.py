import pytest
import torch
from pilotfish.kernels.own_experts import own_experts_ref
from pilotfish.kernels.token_rows import (
    pack_rows,
    pack_rows_ref,
    pack_rows_triton,
    unpack_choices_ref,
    unpack_choices_triton,
    unpack_rows,
)

PACK = {"cpu": pack_rows_triton, "cuda": pack_rows}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tokens(num_tokens, hidden, num_choices, dtype, device):
    x = torch.randn(num_tokens, hidden, device=device).to(dtype)
    weights = torch.rand(num_tokens, num_choices, device=device)
    return x, weights, torch.randint(-1, 60, (num_tokens, num_choices), dtype=torch.int32, device=device)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(0, 3), (1, 1), (5, 9), (12, 12)])
@pytest.mark.parametrize(("hidden", "num_choices"), [(24, 1), (2058, 3), (64, 8)])
def test_packing_equals_its_reference_and_comes_back(device, x_dtype, num_tokens, num_rows, hidden, num_choices):
    x, weights, slots = tokens(num_tokens, hidden, num_choices, x_dtype, device)
    is_padding = torch.arange(num_tokens, device=device) % 3 == 1
    for padding in (None, is_padding):
        rows = PACK[device](x, weights, slots, num_rows=num_rows, is_padding_T=padding)
        assert torch.equal(rows, pack_rows_ref(x, weights, slots, num_rows=num_rows, is_padding_T=padding))
        assert rows.shape[1] * 4 % 16 == 0
        got_x, got_weights, own = unpack_rows(rows, x, num_choices, first=7, num_own=20)
        assert torch.equal(got_x[:num_tokens], x)
        assert torch.equal(got_weights[:num_tokens], weights)
        kept = slots if padding is None else slots.masked_fill(is_padding.unsqueeze(1), -1)
        assert torch.equal(own[:num_tokens], own_experts_ref(kept, first=7, num_own=20))
        assert not got_x[num_tokens:].any()
        assert not got_weights[num_tokens:].any()
        assert (own[num_tokens:] == -1).all()


@pytest.mark.parametrize("num_rows", [0, 1, 700])
def test_choices_are_unpacked_as_the_reference_says(device, num_rows):
    x, weights, slots = tokens(num_rows, 24, 8, torch.float32, device)
    rows = pack_rows_ref(x, weights, slots, num_rows=num_rows)
    unpack = unpack_choices_triton
    for got, want in zip(
        unpack(rows, 24, 8, first=32, num_own=9), unpack_choices_ref(rows, 24, 8, first=32, num_own=9), strict=True
    ):
        assert torch.equal(got, want)


def test_what_does_not_fit_is_refused():
    x, weights, slots = tokens(4, 24, 2, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"must be \[T, H\]"):
        pack_rows(x[:3], weights, slots, num_rows=4)
    with pytest.raises(ValueError, match=r"slots torch\.int64 int32"):
        pack_rows(x, weights, slots.long(), num_rows=4)
    with pytest.raises(ValueError, match="3 rows for 4 tokens"):
        pack_rows(x, weights, slots, num_rows=3)
    with pytest.raises(ValueError, match="must be contiguous"):
        pack_rows(x.T.contiguous().T, weights, slots, num_rows=4)
    with pytest.raises(ValueError, match="must be bool"):
        pack_rows(x, weights, slots, num_rows=4, is_padding_T=slots[:, 0])
