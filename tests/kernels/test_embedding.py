"""embedding on the CPU against torch's."""

import pytest
import torch
from pilotfish.kernels.cpu import ops as cpu_ops
from pilotfish.kernels.embedding import embedding, embedding_ref


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(0, 8), (1, 1), (3, 37), (300, 576)])
def test_rows_of_the_table(num_tokens, hidden, weight_dtype):
    weight = torch.randn(50, hidden + 2).to(weight_dtype)[:, 1 : hidden + 1]
    ids = torch.randint(0, 50, (num_tokens,))
    assert cpu_ops.supports("embedding", ids.dtype, weight_dtype)
    x = embedding(ids, weight, dtype=torch.float32)
    assert x.is_contiguous()
    assert torch.equal(x, embedding_ref(ids, weight, dtype=torch.float32))


def test_other_dtypes_are_torchs():
    weight = torch.randn(5, 8, dtype=torch.bfloat16)
    assert torch.equal(embedding(torch.tensor([4, 0]), weight, dtype=torch.bfloat16), weight[[4, 0]])


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
