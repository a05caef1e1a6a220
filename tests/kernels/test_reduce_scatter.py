"""A sum over ranks of which each gets its rows: its checks anywhere; on one GPU against the reference."""

import pytest
import torch
from pilotfish.kernels.reduce_scatter import reduce_scatter, reduce_scatter_ref, unfit_reason
from stream_ranks import StreamRanks, buffers_on_cpu, make_parts


def test_the_reference_gives_each_rank_its_rows():
    parts = make_parts(3, (6, 16), torch.float16)
    total = torch.stack(parts).double().sum(0)
    for rank in range(3):
        own = reduce_scatter_ref(parts, rank).double()
        torch.testing.assert_close(own, total[2 * rank : 2 * rank + 2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((4, 64), torch.float32, "float32"),
        ((5, 64), torch.bfloat16, "2 \\* rows"),
        ((4, 12), torch.bfloat16, "a multiple of 8"),
        ((66, 64), torch.bfloat16, "4224 bytes, the buffers hold 4096"),
    ],
)
def test_what_does_not_fit_says_why(shape, dtype, reason):
    with pytest.raises(ValueError, match=reason):
        reduce_scatter(torch.zeros(shape, dtype=dtype), buffers_on_cpu())


def test_what_fits_is_refused_on_a_cpu():
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    assert unfit_reason(x.shape, x.dtype, buffers_on_cpu()) is None
    with pytest.raises(ValueError, match=r"compute capability 9\.0"):
        reduce_scatter(x, buffers_on_cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_on_a_gpu_it_equals_the_reference(size, dtype):
    ranks = StreamRanks(size)
    for seed, (rows, hidden) in enumerate([(1, 2048), (16, 2048), (1, 8), (5, 576), (1, 4096), (30, 64), (2, 2048)]):
        parts = make_parts(size, (size * rows, hidden), dtype, device="cuda", seed=seed)
        results = ranks.run(lambda rank, buffers: reduce_scatter(parts[rank], buffers))  # noqa: B023 - called at once
        ranks.assert_all_came()
        for rank, result in enumerate(results):
            assert torch.equal(result, reduce_scatter_ref(parts, rank))
