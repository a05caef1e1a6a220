"""The CUDA C++ kernel for few rows: on a GPU against the references; anywhere, how it is planned, chosen and compiled."""

import logging
import sys

import pytest
import torch
from pilotfish.kernels import gated_linear as gated_linear_module
from pilotfish.kernels import linear as linear_module
from pilotfish.kernels import tuning
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.gated_activation import ACTIVATIONS, gated_activation
from pilotfish.kernels.gated_linear import gated_linear_ref
from pilotfish.kernels.linear import choose_skinny_config, linear_ref
from pilotfish.kernels.skinny_linear import fits, skinny_linear
from pilotfish.kernels.streaming_linear import (
    MAX_SPLITS,
    TILES,
    launch_streaming,
    plan_launch,
    split_steps,
    unfit_reason,
    unfit_sizes,
)
from pilotfish.kernels.tune_linear import ROWS, SHAPES, streaming_configs

# (K, N): outputs even, for half of them are gates. Tails of tiles and of steps of 64, rows of y at odd places.
RAGGED, EVEN, LONG = (1000, 330), (512, 512), (4104, 1032)
GPU_ROWS = (1, 2, 5, 8, 16, 31, 64, 100, 128)
DTYPES = (torch.bfloat16, torch.float16)


def config_of(tile_n=64, split_k=1, num_stages=3, early_start=True, **more):
    return {
        "kernel": "streaming",
        "tile_n": tile_n,
        "split_k": split_k,
        "num_stages": num_stages,
        "early_start": early_start,
        **more,
    }


# --- on a GPU


def make(num_rows, size, dtype):
    """x and weight are views into wider tensors: their rows are not contiguous. No kernel runs when this returns."""
    num_inputs, num_outputs = size
    generator = torch.Generator("cuda").manual_seed(num_rows)
    x = torch.randn(num_rows, num_inputs + 24, device="cuda", generator=generator)[:, 8 : num_inputs + 8]
    weight = torch.randn(num_outputs, num_inputs + 16, device="cuda", generator=generator)[:, :num_inputs] / num_inputs**0.5
    bias = torch.randn(num_outputs, device="cuda", generator=generator).to(dtype)
    wide_x = torch.empty(num_rows, num_inputs + 24, device="cuda", dtype=dtype)
    wide_weight = torch.empty(num_outputs, num_inputs + 16, device="cuda", dtype=dtype)
    x, weight = wide_x[:, 8 : num_inputs + 8].copy_(x), wide_weight[:, :num_inputs].copy_(weight)
    torch.cuda.synchronize()
    return x, weight, bias


def run(x, weight, bias, config, *, out_dtype=None, activation=""):
    """y, written over NaN; what lies before and after it has stayed."""
    num_outputs = weight.shape[0] // (2 if activation else 1)
    guarded = torch.full((x.shape[0] + 2, num_outputs), float("nan"), device="cuda", dtype=out_dtype or x.dtype)
    launch_streaming(x, weight, bias, guarded[1:-1], activation, config)
    assert bool(guarded[[0, -1]].isnan().all())
    return guarded[1:-1]


def assert_close(y, expected, tolerance):
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=tolerance[0], atol=tolerance[1])


def assert_linear_is_right(num_rows, size, dtype, config):
    x, weight, bias = make(num_rows, size, dtype)
    for some_bias in (None, bias):
        assert_close(run(x, weight, some_bias, config), linear_ref(x, weight, some_bias), linear_module.TOLERANCE[dtype])
    y = run(x, weight, bias, config, out_dtype=torch.float32)
    assert_close(y, linear_ref(x, weight, bias, out_dtype=torch.float32), linear_module.TOLERANCE[torch.float32])


def assert_gated_linear_is_right(num_rows, size, dtype, config, activation="silu"):
    x, weight, bias = make(num_rows, size, dtype)
    for some_bias in (None, bias):
        y = run(x, weight, some_bias, config, activation=activation)
        expected = gated_linear_ref(x, weight, some_bias, activation=activation)
        assert_close(y, expected, gated_linear_module.TOLERANCE[dtype])


@pytest.mark.gpu
def test_on_a_gpu_one_tile_and_one_step():
    """The smallest there is, for whoever looks for a fault: 64 numbers of K, whole tiles, nothing split."""
    assert_linear_is_right(8, (64, 64), torch.bfloat16, config_of(num_stages=2, early_start=False))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", GPU_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [EVEN, RAGGED, LONG], ids=["even", "ragged", "long"])
def test_on_a_gpu_it_equals_the_reference(num_rows, dtype, size):
    assert_linear_is_right(num_rows, size, dtype, config_of(num_stages=4))
    assert_gated_linear_is_right(num_rows, size, dtype, config_of(num_stages=4))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", GPU_ROWS)
@pytest.mark.parametrize("split_k", range(1, MAX_SPLITS + 1))
def test_on_a_gpu_every_split_is_right(split_k, num_rows):
    assert_linear_is_right(num_rows, RAGGED, torch.bfloat16, config_of(split_k=split_k))
    assert_gated_linear_is_right(num_rows, RAGGED, torch.bfloat16, config_of(split_k=split_k))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [3, 32, 128])
@pytest.mark.parametrize("split_k", [1, 3, 8])
@pytest.mark.parametrize("tile_n", TILES)
def test_on_a_gpu_every_tile_is_right(tile_n, split_k, num_rows):
    for size in (LONG, EVEN):
        assert_linear_is_right(num_rows, size, torch.bfloat16, config_of(tile_n, split_k, num_stages=2))
        assert_gated_linear_is_right(num_rows, size, torch.bfloat16, config_of(tile_n, split_k, num_stages=2))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_the_activation_is_the_one_asked_for(dtype, activation):
    assert_gated_linear_is_right(7, RAGGED, dtype, config_of(128, 2), activation)


@pytest.mark.gpu
@pytest.mark.parametrize("num_stages", [2, 3, 5, 8, 20])
def test_on_a_gpu_any_number_of_stages_is_right(num_stages):
    assert_linear_is_right(9, LONG, torch.bfloat16, config_of(num_stages=num_stages, split_k=2))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [5, 32, 64, 128])
@pytest.mark.parametrize("split_k", [1, 2, 4])
@pytest.mark.parametrize(("num_stages", "x_stages"), [(2, 3), (3, 2), (8, 3), (12, 5)])
def test_on_a_gpu_the_stages_of_x_are_any_number_too(num_stages, x_stages, split_k, num_rows):
    """With sums beside the stages, and, where they are too many, in their place."""
    for tile_n in (64, 128, 192):
        config = config_of(tile_n, split_k, num_stages, x_stages=x_stages)
        if unfit_sizes(config, num_rows, 4104) is None:
            assert_linear_is_right(num_rows, LONG, torch.bfloat16, config)
            assert_gated_linear_is_right(num_rows, RAGGED, torch.bfloat16, config)


@pytest.mark.gpu
def test_on_a_gpu_x_may_lie_anywhere():
    x, weight, bias = make(5, RAGGED, torch.bfloat16)
    expected = run(x, weight, bias, config_of())
    wide = torch.empty(5, 1003, device="cuda", dtype=torch.bfloat16)
    for start in (0, 1):  # its rows, or all of it, at odd places
        other = wide[:, start : start + 1000].copy_(x)
        assert torch.equal(run(other, weight, bias, config_of()), expected)
    assert torch.equal(run(x[:1].expand(5, -1), weight, bias, config_of())[4], expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [2, 16, 64, 128])
@pytest.mark.parametrize("split_k", [1, 4, 8])
def test_on_a_gpu_the_same_bits_again_and_whatever_the_other_rows_hold(split_k, num_rows):
    x, weight, bias = make(num_rows, LONG, torch.bfloat16)
    config = config_of(128, split_k)
    y = run(x, weight, bias, config)
    for _ in range(20):
        assert torch.equal(run(x, weight, bias, config), y)
    others = x * -3
    others[1] = x[1]
    assert torch.equal(run(others, weight, bias, config)[1], y[1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [config_of(64, 4, 8), config_of(128, 2, 6), config_of(192, 1, 4), config_of(64, 2, 12, x_stages=3)],
    ids=str,
)
@pytest.mark.parametrize("num_rows", [2, 64])
def test_on_a_gpu_a_chain_in_a_cuda_graph_equals_the_same_calls_one_by_one(config, num_rows):
    """An early start must wait for what it reads, and for the readers of the memory that it writes."""
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(2048, 2048, device="cuda", generator=generator).bfloat16() / 45 for _ in range(20)]
    gates = [torch.randn(4096, 2048, device="cuda", generator=generator).bfloat16() / 20 for _ in range(20)]
    x = torch.randn(num_rows, 2048, device="cuda", generator=generator).bfloat16()
    torch.cuda.synchronize()

    def chain(after_each=lambda: None):
        y = x
        for weight, gate in zip(weights, gates, strict=True):
            y = skinny_linear(y, weight, None, config, out_dtype=torch.bfloat16)
            after_each()
            y = skinny_linear(y, gate, None, config, out_dtype=torch.bfloat16, activation="silu")
            after_each()
            y = gated_activation(torch.cat([y, y], dim=1), "silu").clamp(-2, 2)
            after_each()
        return y

    expected = chain(torch.cuda.synchronize)
    assert bool(expected.isfinite().all())
    assert torch.equal(chain(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(50):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_on_a_gpu_the_table_chooses_it(monkeypatch):
    x, weight, bias = make(5, (1024, 2048), torch.bfloat16)
    monkeypatch.setattr(tuning, "lookup", lambda *args: config_of(128, 2))
    assert choose_skinny_config("linear", weight, 5) == config_of(128, 2)
    y = linear_module.linear(x, weight, bias)
    assert torch.equal(y, run(x, weight, bias, config_of(128, 2)))
    assert_close(y, linear_ref(x, weight, bias), linear_module.TOLERANCE[torch.bfloat16])
    narrow = torch.randn(64, 1001, device="cuda").bfloat16()  # rows at odd places: cuBLAS serves
    assert choose_skinny_config("linear", narrow, 5) is None


# --- anywhere


@pytest.mark.parametrize("num_inputs", [64, 65, 512, 1000, 4096, 12288])
@pytest.mark.parametrize("split_k", range(1, MAX_SPLITS + 1))
def test_the_ctas_of_a_cluster_share_the_steps_evenly(num_inputs, split_k):
    if unfit_sizes(config_of(split_k=split_k), 8, num_inputs) is not None:
        assert split_k > num_inputs / 64
        return
    steps = split_steps(plan_launch(config_of(split_k=split_k), 8, 100, num_inputs, False))
    assert [step for of_cta in steps for step in of_cta] == list(range(-(-num_inputs // 64)))
    lengths = [len(of_cta) for of_cta in steps]
    assert len(lengths) == split_k
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) > 0


@pytest.mark.parametrize("gated", [False, True])
def test_a_plan_has_every_output_once(gated):
    for tile_n in TILES:
        for split_k in range(1, MAX_SPLITS + 1):
            plan = plan_launch(config_of(tile_n, split_k, 4), 5, 1000, 4096, gated)
            assert plan.outputs == (tile_n // 2 if gated else tile_n)
            assert (plan.num_tiles - 1) * plan.outputs < 1000 <= plan.num_tiles * plan.outputs
            assert (plan.units_each - 1) * split_k < plan.outputs // 8 <= plan.units_each * split_k
            assert plan.rows == 8


def test_there_are_no_more_stages_than_steps():
    assert plan_launch(config_of(num_stages=20), 8, 64, 640, False).num_stages == 10
    assert plan_launch(config_of(num_stages=20, split_k=3), 8, 64, 640, False).num_stages == 4


def test_sums_lie_beside_the_stages_where_there_is_room():
    """Of many rows only where few stages of x leave it, and where there is somebody to send them."""
    for num_rows, config, reuses in (
        (32, config_of(64, 2, 8), False),
        (128, config_of(64, 2, 8), True),
        (128, config_of(64, 2, 17, x_stages=3), False),
        (128, config_of(192, 4, 7, x_stages=3), True),
        (128, config_of(64, 1, 8, x_stages=3), True),
    ):
        plan = plan_launch(config, num_rows, 4096, 4096, False)
        assert plan.reuses_stages == reuses
        assert plan.shared_bytes <= loader.MAX_SHARED_BYTES


@pytest.mark.parametrize(
    ("changes", "num_rows", "num_inputs", "reason"),
    [
        ({}, 129, 4096, "129 rows"),
        ({}, 0, 4096, "0 rows"),
        ({"tile_n": 96}, 8, 4096, "tile_n 96"),
        ({"split_k": 9}, 8, 4096, "split_k 9"),
        ({"split_k": 4}, 8, 192, "too few to split by 4"),
        ({}, 8, 0, "too few"),
        ({"num_stages": 1}, 8, 4096, "num_stages 1"),
        ({"x_stages": 1}, 8, 4096, "x_stages 1"),
        ({"num_stages": 30}, 8, 4096, "bytes of shared memory"),
    ],
)
def test_what_does_not_fit_says_why(changes, num_rows, num_inputs, reason):
    config = {**config_of(), **changes}
    assert reason in unfit_sizes(config, num_rows, num_inputs)
    assert not fits(config, num_rows, num_inputs)


def test_a_weight_that_does_not_fit_says_why():
    weight = torch.zeros(64, 136, dtype=torch.bfloat16)
    assert "compute capability 9.0" in unfit_reason(config_of(), weight, 8, gated=False)
    assert "multiples of 16 bytes" in unfit_reason(config_of(), weight[:, :135].contiguous(), 8, gated=False)
    assert "multiples of 16 bytes" in unfit_reason(config_of(), weight[:, 1:129], 8, gated=False)
    assert "float32" in unfit_reason(config_of(), weight.float(), 8, gated=False)
    with pytest.raises(ValueError, match="streaming_linear: 129 rows"):
        launch_streaming(weight, weight, None, torch.zeros(129, 64), "", config_of())


def test_the_configs_to_try_are_few_and_fit():
    for layers in SHAPES.values():
        for op, num_outputs, num_inputs, _ in layers:
            for num_rows in ROWS[1:]:
                gated = op == "gated_linear"
                configs = streaming_configs(num_outputs, num_inputs, num_rows, gated=gated)
                assert 0 < len(configs) <= (18 if num_rows >= 16 else 6)
                assert len({tuple(config.items()) for config in configs}) == len(configs)
                for config in configs:
                    assert unfit_sizes(config, num_rows, num_inputs, gated=gated) is None


# --- the loader


MACROS = (("ROWS", 8), ("TILE", 64), ("GATED", 0), ("ONE_RING", 1), ("FLOAT16", 0))


def test_a_kernel_is_compiled_once_and_then_found(fresh_loader, monkeypatch):
    compiled = []
    monkeypatch.setattr(loader, "compile_source", lambda code, name, options: compiled.append(options) or b"cubin")
    assert loader.load("streaming_linear", MACROS, 0) == (b"cubin", "streaming_linear", 0)
    loader.load_once.cache_clear()  # another process
    assert loader.load("streaming_linear", MACROS, 1) == (b"cubin", "streaming_linear", 1)
    assert len(compiled) == 1
    assert "--gpu-architecture=sm_90a" in compiled[0]
    assert "-DTILE=64" in compiled[0]
    loader.load("streaming_linear", (*MACROS, ("MORE", 1)), 0)
    assert len(list(fresh_loader.iterdir())) == len(compiled) == 2


def test_without_a_compiler_there_is_one_warning_and_no_kernel(fresh_loader, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with caplog.at_level(logging.WARNING):
        assert loader.load("streaming_linear", MACROS, 0) is None
        assert loader.load("streaming_linear", (*MACROS, ("MORE", 1)), 0) is None
    (record,) = caplog.records
    assert "no NVRTC" in record.message
    assert "pip install" in record.message
    assert loader.unavailable_reason() in record.message


def test_without_a_compiler_the_table_s_choice_is_passed_over(fresh_loader, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(loader, "can_run_on", lambda device: True)
    monkeypatch.setattr(tuning, "lookup", lambda *args: config_of())
    weight = torch.zeros(64, 128, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert [choose_skinny_config(op, weight, 8) for op in ("linear", "linear_float32", "gated_linear")] == [None] * 3
    assert len(caplog.records) == 1
    twin = {"kernel": "gemv", "block_n": 1, "num_warps": 4}
    monkeypatch.setattr(tuning, "lookup", lambda *args: config_of() | {"twin": twin})
    assert choose_skinny_config("linear", weight, 8) == twin
    monkeypatch.setattr(tuning, "lookup", lambda *args: config_of() | {"twin": {"kernel": "cublas"}})
    assert choose_skinny_config("linear", weight, 8) is None
    monkeypatch.setattr(tuning, "lookup", lambda *args: config_of())
    monkeypatch.setattr(loader, "_failure", None)
    loader.load_once.cache_clear()
    monkeypatch.setattr(loader, "compile_source", lambda code, name, options: b"cubin")
    assert choose_skinny_config("linear", weight, 8) == config_of()


def test_a_cache_that_cannot_be_written_says_so(fresh_loader, monkeypatch, caplog):
    monkeypatch.setattr(loader, "compile_source", lambda code, name, options: b"cubin")
    fresh_loader.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert loader.load("streaming_linear", MACROS, 0) is None
    assert "set PILOTFISH_CACHE" in caplog.text


def test_nvrtc_compiles_it_and_names_what_is_wrong(nvrtc):
    options = ["--gpu-architecture=sm_90a", "-std=c++17"]
    with pytest.raises(loader.BuildError, match=r"nothing.cu\(1\): error"):
        loader.compile_source(b"__global__ int nothing() {}", "nothing.cu", options)
    for macros in (MACROS, (("ROWS", 128), ("TILE", 256), ("GATED", 1), ("ONE_RING", 0), ("FLOAT16", 1))):
        defines = [f"-D{name}={value}" for name, value in macros]
        code = (loader.SOURCE_DIR / "streaming_linear.cu").read_bytes()
        assert loader.compile_source(code, "streaming_linear.cu", options + defines).startswith(b"\x7fELF")
