"""The sum over ranks: its reference, its checks, that it compiles; on one GPU, where the ranks are streams of this process."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from pilotfish.kernels.all_reduce import (
    MAX_HIDDEN,
    all_reduce,
    all_reduce_norm,
    all_reduce_norm_ref,
    all_reduce_ref,
    unfit_reason,
)
from pilotfish.kernels.rms_norm import TOLERANCE
from stream_ranks import StreamRanks, buffers_on_cpu, make_parts

EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float16)


# --- the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_reference_sums_as_float64_does(size, dtype):
    parts = make_parts(size, (5, 64), dtype)
    exact = torch.stack(parts).double().sum(0)
    torch.testing.assert_close(all_reduce_ref(parts).double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-6)


def test_the_reference_rounds_the_sum_before_the_residual_is_added():
    one, tiny = torch.ones(1, 8, dtype=torch.bfloat16), torch.full((1, 8), 2.0**-8, dtype=torch.bfloat16)
    _, residual = all_reduce_norm_ref([one, tiny], tiny * 0.75, torch.ones(8, dtype=torch.bfloat16), EPS)
    assert torch.equal(residual, one)  # 1 + 2^-8 rounds to 1, and so does 1 + 0.75 * 2^-8; their sum at once would not


# --- checks


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((4, 64), torch.float32, "float32"),
        ((8, 12), torch.bfloat16, "multiple of 8"),
        ((33, 64), torch.bfloat16, "4224 bytes, the buffers hold 4096"),
    ],
)
def test_what_does_not_fit_says_why(shape, dtype, reason):
    assert reason in unfit_reason(torch.Size(shape), dtype, buffers_on_cpu())
    with pytest.raises(ValueError, match=reason):
        all_reduce(torch.zeros(shape, dtype=dtype), buffers_on_cpu())


def test_what_lies_wrong_says_why():
    x = torch.zeros(8, 72, dtype=torch.bfloat16)
    assert unfit_reason(x.shape, x.dtype, buffers_on_cpu()) is None
    for view in (x[:, :64], x.view(-1)[4:516]):
        with pytest.raises(ValueError, match="contiguous and begin at a multiple of 16 bytes"):
            all_reduce(view, buffers_on_cpu())
    with pytest.raises(ValueError, match=r"compute capability 9\.0, x is on cpu"):
        all_reduce(x, buffers_on_cpu())


# --- on one GPU


def check_sum(ranks, shape, dtype, *, two_shot, seed):
    parts = make_parts(len(ranks.streams), shape, dtype, device="cuda", seed=seed)
    results = ranks.run(lambda rank, buffers: all_reduce(parts[rank], buffers, two_shot=two_shot))
    ranks.assert_all_came()
    for result in results:
        assert torch.equal(result, all_reduce_ref(parts))


def check_norm(ranks, shape, dtype, *, two_shot, seed):
    parts = make_parts(len(ranks.streams), shape, dtype, device="cuda", seed=seed)
    residual, weight = (
        make_parts(1, shape, dtype, device="cuda", seed=seed + 1)[0],
        torch.randn(shape[1], device="cuda").to(dtype),
    )
    expected_y, expected_residual = all_reduce_norm_ref(parts, residual, weight, EPS)
    results = ranks.run(lambda rank, buffers: all_reduce_norm(parts[rank], residual, weight, EPS, buffers, two_shot=two_shot))
    ranks.assert_all_came()
    for y, new_residual in results:
        assert torch.equal(new_residual, expected_residual)
        assert torch.equal(y, results[0][0])
        torch.testing.assert_close(y, expected_y, rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][1])


@pytest.mark.gpu
def test_on_a_gpu_the_smallest_sum():
    """One CTA, one unit a thread, for whoever looks for a fault."""
    check_sum(StreamRanks(2), (1, 256), torch.bfloat16, two_shot=False, seed=0)


@pytest.mark.gpu
@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_on_a_gpu_it_equals_the_reference(size, dtype, two_shot):
    """Calls of changing sizes in a row, so that all generations are used and what was larger before is cleared."""
    ranks = StreamRanks(size)
    for seed, (rows, hidden) in enumerate([(1, 4096), (7, 4096), (1, 64), (16, 576), (3, 2048), (1, 8), (13, 4096), (2, 64)]):
        check_sum(ranks, (rows, hidden), dtype, two_shot=two_shot, seed=seed)
        check_norm(ranks, (rows, hidden), dtype, two_shot=two_shot, seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("shape", [(300, 1024), (1, 8192), (3, 8200), (2, 16384), (1, MAX_HIDDEN)])
def test_on_a_gpu_any_size_is_right(shape, two_shot):
    """More rows than CTAs, rows of several units a thread."""
    ranks = StreamRanks(2)
    for seed in range(4):
        check_norm(ranks, shape, torch.bfloat16, two_shot=two_shot, seed=seed)
        check_sum(ranks, shape, torch.bfloat16, two_shot=two_shot, seed=seed)


@pytest.mark.gpu
def test_on_a_gpu_not_a_number_arrives_too():
    ranks, parts = StreamRanks(2), make_parts(2, (2, 64), torch.bfloat16, device="cuda")
    parts[0][0, 5], parts[1][1, 6], parts[1][0, 7] = float("nan"), float("inf"), float("-inf")
    for result in ranks.run(lambda rank, buffers: all_reduce(parts[rank], buffers)):
        assert torch.equal(result.isfinite(), (parts[0] + parts[1]).isfinite())
    ranks.assert_all_came()


@pytest.mark.gpu
def test_on_a_gpu_x_and_the_residual_stay():
    ranks, parts = StreamRanks(2), make_parts(2, (4, 512), torch.bfloat16, device="cuda")
    residual, weight = parts[0] * 2, parts[0][0].contiguous()
    before = [tensor.clone() for tensor in (*parts, residual)]
    ranks.run(lambda rank, buffers: all_reduce_norm(parts[rank], residual, weight, EPS, buffers))
    assert all(torch.equal(tensor, old) for tensor, old in zip((*parts, residual), before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("two_shot", [False, True])
def test_on_a_gpu_a_rank_that_does_not_come_ends_the_wait(two_shot):
    ranks, x = StreamRanks(3, timeout_s=0.2), torch.ones(3, 4096, device="cuda", dtype=torch.bfloat16)
    ranks.run(lambda rank, buffers: all_reduce(x, buffers, two_shot=two_shot), first=1)
    alone, *others = (buffers.failure for buffers in ranks.buffers)
    assert alone == ""
    assert all(failure.endswith("took no part in a collective within 0.2 s") for failure in others)
    assert two_shot or all(failure.startswith("rank 0") for failure in others)  # in two shots one may wait for one that waits
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    patient = replace(ranks.buffers[1], timeout_s=60.0)
    for _ in range(10):
        all_reduce(x, patient, two_shot=two_shot)  # waits no more
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) < 1000


@pytest.mark.gpu
def test_on_a_gpu_the_host_ends_a_wait():
    ranks, x = StreamRanks(2, timeout_s=60.0), torch.ones(3, 4096, device="cuda", dtype=torch.bfloat16)
    timer = threading.Timer(0.3, ranks.buffers[1].end_waits)
    start_s = time.monotonic()
    timer.start()
    ranks.run(lambda rank, buffers: all_reduce(x, buffers), first=1)
    assert 0.25 < time.monotonic() - start_s < 10
    assert ranks.buffers[1].failure == "waiting for the other ranks was ended"
