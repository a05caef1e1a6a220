"""What the kernels over ranks share: their buffers, their launch, and that each of them compiles."""

import pytest
from pilotfish.kernels.all_reduce import MAX_HIDDEN
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.peer_buffers import receive_bytes, split_chunk
from stream_ranks import buffers_on_cpu


def test_a_rank_receives_three_calls_from_each():
    assert receive_bytes(2, 1 << 20) == 6 << 20


def test_buffers_are_of_two_to_eight_ranks():
    for changes in ({"addresses": (0,)}, {"addresses": (0,) * 9}, {"rank": 2}, {"rank": -1}):
        with pytest.raises(ValueError, match="serves 2 to 8"):
            buffers_on_cpu(**changes)
    with pytest.raises(ValueError, match="capacity_bytes 100"):
        buffers_on_cpu(capacity_bytes=100)


def test_a_failure_is_told():
    buffers = buffers_on_cpu()
    assert buffers.failure == ""
    buffers.failed.fill_(2)
    assert buffers.failure == "rank 1 took no part in a collective within 1 s"
    buffers.end_waits()
    assert buffers.failure == "waiting for the other ranks was ended"


@pytest.mark.parametrize("hidden", [8, 576, 2048, 4096, 7168, 8192, 8200, 16384, MAX_HIDDEN])
def test_the_threads_of_a_row_have_all_of_it(hidden):
    units, threads = split_chunk(hidden // 8)
    assert threads % 32 == 0
    assert threads <= 1024
    assert units <= 4
    assert (units - 1) * 1024 < hidden // 8 <= units * threads
    assert hidden <= 8192 or threads > 512


VARIANTS = [
    ("all_reduce", {"UNITS": 1, "FLOAT16": 0, "NORM": 1, "TWO_SHOT": 0}),
    ("all_reduce", {"UNITS": 4, "FLOAT16": 1, "NORM": 1, "TWO_SHOT": 1}),
    ("all_reduce", {"UNITS": 1, "FLOAT16": 0, "NORM": 0, "TWO_SHOT": 0}),
    ("all_reduce", {"UNITS": 1, "FLOAT16": 0, "NORM": 0, "TWO_SHOT": 1}),
    ("reduce_scatter", {"UNITS": 1, "FLOAT16": 0}),
    ("all_gather", {"UNITS": 1}),
    ("meet", {"UNITS": 1}),
]


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize(("source", "macros"), VARIANTS)
def test_nvrtc_compiles_them(nvrtc, source, macros, ranks):
    options = ["--gpu-architecture=sm_90a", "-std=c++17", f"-DRANKS={ranks}"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    code = (loader.SOURCE_DIR / f"{source}.cu").read_bytes()
    assert loader.compile_source(code, f"{source}.cu", options).startswith(b"\x7fELF")
