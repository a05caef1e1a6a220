"""embedding against torch's: C++ and Triton."""

import pytest
import torch
from pilotfish.kernels.cpu import ops as cpu_ops
from pilotfish.kernels.embedding import embedding, embedding_ref, embedding_triton


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(0, 8), (1, 1), (3, 37), (300, 576)])
def test_rows_of_the_table(num_tokens, hidden, weight_dtype):
    weight = torch.randn(50, hidden + 2).to(weight_dtype)[:, 1 : hidden + 1]
    ids = torch.randint(0, 50, (num_tokens,))
    assert cpu_ops.supports("embedding", ids.dtype, weight_dtype)
    x = embedding(ids, weight, dtype=torch.float32)
    assert x.is_contiguous()
    assert torch.equal(x, weight[ids].float())


def test_other_dtypes_are_torchs():
    weight = torch.randn(5, 8, dtype=torch.bfloat16)
    assert torch.equal(embedding(torch.tensor([4, 0]), weight, dtype=torch.bfloat16), weight[[4, 0]])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_shares_of_the_table_add_up(weight_dtype):
    weight, ids = torch.randn(50, 37).to(weight_dtype), torch.randint(0, 50, (300,))
    parts = [embedding(ids, weight[first:stop], dtype=torch.float32, first_id=first) for first, stop in ((0, 20), (20, 50))]
    assert all(bool((part == 0).all(1).any()) for part in parts)
    assert torch.equal(sum(parts), weight[ids].float())


SMALL = {"one": (1, 8, 0), "narrow": (3, 37, 7), "wide": (5, 2050, 0)}
LARGE = {"many": (16384, 4096, 75968), "none": (0, 64, 0)}


def test_a_kernel_equals_the_reference(device, dtype, case):
    num_tokens, hidden, first_id = case
    weight = torch.randn(2048 if device == "cuda" else 20, hidden + 8, device=device).to(dtype)[:, :hidden]
    ids = torch.randint(first_id - 5, first_id + len(weight) + 5, (num_tokens,), device=device)
    x = embedding_triton(ids, weight, dtype=dtype, first_id=first_id)
    assert x.is_contiguous()
    assert torch.equal(x, embedding_ref(ids, weight, dtype=dtype, first_id=first_id))


@pytest.mark.parametrize(
    ("ids", "weight"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(4, 3)),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(4, 3)),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3, 4).T),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(4)),
    ],
)
def test_what_does_not_fit_is_refused(ids, weight):
    with pytest.raises(ValueError, match="embedding: "):
        embedding(ids, weight, dtype=torch.float32)
