"""Every rank's numbers on all ranks: its checks anywhere; on one GPU bit by bit, among sums through the same buffers."""

import pytest
import torch
from pilotfish.kernels.all_gather import all_gather, unfit_reason
from pilotfish.kernels.all_reduce import all_reduce, all_reduce_ref
from stream_ranks import StreamRanks, buffers_on_cpu, make_parts

SHAPES = [(3,), (1, 5), (64, 1056), (2,), (1,), (7, 33), (16, 1056), (1, 1)]


def test_marks_take_as_much_as_the_numbers():
    for num_words, fits in ((512, True), (511, True), (513, False)):
        assert (unfit_reason(torch.Size([num_words]), torch.int32, buffers_on_cpu()) is None) is fits


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(3, dtype=torch.bfloat16), "6 bytes, which must be a multiple of 4"),
        (torch.zeros(1024), "4096 bytes, sent with as many of marks"),
        (torch.zeros(9)[1:], "begin at a multiple of 16 bytes"),
        (torch.zeros(8), r"compute capability 9\.0"),
    ],
)
def test_what_does_not_fit_says_why(x, reason):
    with pytest.raises(ValueError, match=reason):
        all_gather(x, buffers_on_cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 3, 4])
def test_on_a_gpu_all_bits_arrive(size):
    """Whatever they are, an empty slot's own too."""
    ranks, generator = StreamRanks(size), torch.Generator("cuda").manual_seed(size)
    for seed, shape in enumerate(SHAPES):
        words = torch.randint(-(2**31), 2**31, (size, *shape), generator=generator, device="cuda").int()
        words.view(size, -1)[:, ::3] = -0x7FFF8000  # minus zeros
        parts = [part.clone() for part in words]  # each begins at a multiple of 16 bytes
        for result in ranks.run(lambda rank, buffers: all_gather(parts[rank], buffers)):  # noqa: B023
            assert torch.equal(result, words)
        terms = make_parts(size, (1 + seed, 512), torch.bfloat16, device="cuda", seed=seed)
        for result in ranks.run(lambda rank, buffers: all_reduce(terms[rank], buffers)):  # noqa: B023
            assert torch.equal(result, all_reduce_ref(terms))
    ranks.assert_all_came()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16], ids=str)
def test_on_a_gpu_any_dtype_is_gathered(dtype):
    parts = [torch.arange(24, device="cuda").view(4, 6).to(dtype) + 100 * rank for rank in range(2)]
    for result in StreamRanks(2).run(lambda rank, buffers: all_gather(parts[rank], buffers)):
        assert torch.equal(result, torch.stack(parts))
