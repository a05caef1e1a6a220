"""The sum over ranks: its reference, its checks, that it compiles; on one GPU, where the ranks are streams of this process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pilotfish.kernels.all_reduce import (
    MAX_HIDDEN,
    NOTHING,
    PeerBuffers,
    all_reduce,
    all_reduce_norm,
    all_reduce_norm_ref,
    all_reduce_ref,
    receive_bytes,
    split_chunk,
    unfit_reason,
)
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.rms_norm import TOLERANCE

EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float16)
WAIT_S = 20.0


def make_parts(size, shape, dtype, *, device="cpu", seed=0):
    """What each rank has: numbers of order one, some of them zeros of either sign."""
    generator = torch.Generator(device).manual_seed(seed)
    parts = torch.randn(size, *shape, generator=generator, device=device)
    parts[parts.abs() < 0.02] = -0.0
    parts[:, ..., :3] = -0.0
    return list(parts.to(dtype))


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


def cpu_buffers(**changes):
    values = {"rank": 0, "addresses": (0, 0), "capacity_bytes": 4096, "timeout_s": 1.0}
    state, missing = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return PeerBuffers(**(values | {"state": state, "missing": missing} | changes))


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((4, 64), torch.float32, "float32"),
        ((8, 12), torch.bfloat16, "multiple of 8"),
        ((33, 64), torch.bfloat16, "4224 bytes, the buffers hold 4096"),
    ],
)
def test_what_does_not_fit_says_why(shape, dtype, reason):
    assert reason in unfit_reason(torch.Size(shape), dtype, cpu_buffers())
    with pytest.raises(ValueError, match=reason):
        all_reduce(torch.zeros(shape, dtype=dtype), cpu_buffers())


def test_what_lies_wrong_says_why():
    x = torch.zeros(8, 72, dtype=torch.bfloat16)
    assert unfit_reason(x.shape, x.dtype, cpu_buffers()) is None
    for view in (x[:, :64], x.view(-1)[4:516]):
        with pytest.raises(ValueError, match="contiguous and begin at a multiple of 16 bytes"):
            all_reduce(view, cpu_buffers())
    with pytest.raises(ValueError, match=r"compute capability 9\.0, x is on cpu"):
        all_reduce(x, cpu_buffers())


def test_buffers_are_of_two_to_eight_ranks():
    for changes in ({"addresses": (0,)}, {"addresses": (0,) * 9}, {"rank": 2}, {"rank": -1}):
        with pytest.raises(ValueError, match="serves 2 to 8"):
            cpu_buffers(**changes)
    with pytest.raises(ValueError, match="capacity_bytes 100"):
        cpu_buffers(capacity_bytes=100)


def test_a_missing_rank_is_named():
    buffers = cpu_buffers()
    assert buffers.missing_rank is None
    buffers.missing.fill_(2)
    assert buffers.missing_rank == 1


@pytest.mark.parametrize("hidden", [8, 576, 2048, 4096, 7168, 8192, 8200, 16384, MAX_HIDDEN])
def test_the_threads_of_a_row_have_all_of_it(hidden):
    units, threads = split_chunk(hidden // 8)
    assert threads % 32 == 0
    assert threads <= 1024
    assert units <= 4
    assert (units - 1) * 1024 < hidden // 8 <= units * threads
    assert hidden <= 8192 or threads > 512


@pytest.mark.parametrize("two_shot", [0, 1])
@pytest.mark.parametrize(("ranks", "units", "norm"), [(2, 1, 1), (2, 1, 0), (8, 1, 1), (8, 4, 1)])
def test_nvrtc_compiles_it(nvrtc, ranks, units, norm, two_shot):
    macros = {"RANKS": ranks, "UNITS": units, "FLOAT16": 0, "NORM": norm, "TWO_SHOT": two_shot}
    options = ["--gpu-architecture=sm_90a", "-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
    code = (loader.SOURCE_DIR / "all_reduce.cu").read_bytes()
    assert loader.compile_source(code, "all_reduce.cu", options).startswith(b"\x7fELF")


# --- on one GPU, a stream for each rank


class StreamRanks:
    """Ranks whose memory is all on this GPU: the kernel does not know."""

    def __init__(self, size, *, capacity_bytes=1 << 20, timeout_s=WAIT_S):
        num_words = receive_bytes(size, capacity_bytes) // 4
        self.memory = [torch.full((num_words,), NOTHING - (1 << 32), dtype=torch.int32, device="cuda") for _ in range(size)]
        self.streams = [torch.cuda.Stream() for _ in range(size)]
        addresses = tuple(memory.data_ptr() for memory in self.memory)
        self.buffers = [
            PeerBuffers(
                rank=rank,
                addresses=addresses,
                capacity_bytes=capacity_bytes,
                state=torch.zeros(4, dtype=torch.int32, device="cuda"),
                missing=torch.zeros(1, dtype=torch.int32, pin_memory=True),
                timeout_s=timeout_s,
            )
            for rank in range(size)
        ]

    def run(self, call, *, first=0):
        """What call(rank, buffers) returns on each rank from `first` on; they run side by side."""
        torch.cuda.synchronize()
        results = []
        for rank in range(first, len(self.streams)):
            with torch.cuda.stream(self.streams[rank]):
                results.append(call(rank, self.buffers[rank]))
        torch.cuda.synchronize()
        return results

    def assert_all_came(self):
        assert [buffers.missing_rank for buffers in self.buffers] == [None] * len(self.buffers)


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
@pytest.mark.parametrize("size", [2, 3, 4, 8])
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
    alone, *others = (buffers.missing_rank for buffers in ranks.buffers)
    assert alone is None
    assert others == [0, 0] or (two_shot and None not in others)  # in two shots one may wait for one that waits
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    patient = replace(ranks.buffers[1], timeout_s=60.0)
    for _ in range(10):
        all_reduce(x, patient, two_shot=two_shot)  # waits no more
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) < 1000
