"""The CUDA C++ kernel of linear layers for many rows: on a GPU against the reference; anywhere, what it refuses."""

import logging
from itertools import product

import pytest
import torch
from pilotfish.kernels import gated_linear, linear, tuning
from pilotfish.kernels import tall_linear as module
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.gated_activation import ACTIVATIONS
from pilotfish.kernels.skinny_linear import skinny_linear
from pilotfish.kernels.tall_linear import TALL_CONFIGS, shared_bytes, unfit_reason

DTYPES = (torch.bfloat16, torch.float16)
CONFIG = TALL_CONFIGS[0]
CONFIGS = (*TALL_CONFIGS, {**CONFIG, "rows": 16, "num_stages": 2, "band": 1}, {**TALL_CONFIGS[-1], "rows": 48, "band": 3})


def tolerance(dtype, gated):
    return (gated_linear if gated else linear).TOLERANCE[dtype]


def assert_is_right(num_rows, num_outputs, num_inputs, dtype, config, *, gated, activation="silu", has_bias=False):
    """num_outputs: of y. Twice, to the same bits."""
    weight = torch.randn(num_outputs * (2 if gated else 1), num_inputs, device="cuda", dtype=dtype) * num_inputs**-0.5
    bias = torch.randn(weight.shape[0], device="cuda", dtype=dtype) if has_bias else None
    x = torch.randn(num_rows, num_inputs, device="cuda", dtype=dtype)
    if gated:
        expected = gated_linear.gated_linear_ref(x, weight, bias, activation=activation)
    else:
        expected = linear.linear_ref(x, weight, bias)
    results = [
        skinny_linear(x, weight, bias, config, out_dtype=dtype, activation=activation if gated else None) for _ in range(2)
    ]
    rtol, atol = tolerance(dtype, gated)
    torch.testing.assert_close(results[0], expected, rtol=rtol, atol=atol)
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_on_a_gpu_one_item_one_step(gated):
    """The smallest there is, for whoever looks for a fault."""
    config = {**CONFIG, "rows": 16}
    assert_is_right(16, 128 if gated else 256, 64, torch.bfloat16, config, gated=gated)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(str(value) for value in config.values()))
def test_on_a_gpu_it_equals_the_reference(config, gated, dtype):
    """Fewer steps than stages, and many; rows and outputs that fill no item, fewer items than CTAs, and many rounds."""
    for num_rows, (num_outputs, num_inputs) in product((1, 130, 193, 1500), ((8, 64), (776, 320), (3336, 1024))):
        assert_is_right(num_rows, num_outputs, num_inputs, dtype, config, gated=gated)
    assert_is_right(6000, 4096, 128, dtype, config, gated=gated)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("config", [CONFIG, TALL_CONFIGS[-1]], ids=["large", "small"])
def test_on_a_gpu_biases_and_activations_are_those_asked_for(config, activation):
    for gated in (False, True):
        assert_is_right(500, 392, 256, torch.bfloat16, config, gated=gated, activation=activation, has_bias=True)


@pytest.mark.gpu
def test_on_a_gpu_the_table_chooses_it_and_x_may_lie_anywhere(monkeypatch):
    weight = torch.randn(512, 256, device="cuda").bfloat16() / 16
    x = torch.randn(300, 256, device="cuda").bfloat16()
    odd = torch.empty(300, 259, device="cuda", dtype=torch.bfloat16)[:, 1:257].copy_(x)
    plain, gated = (skinny_linear(x, weight, None, CONFIG, out_dtype=x.dtype, activation=name) for name in (None, "silu"))
    monkeypatch.setattr(tuning, "lookup", lambda *args: CONFIG)
    for some_x in (x, odd):
        assert torch.equal(linear.linear(some_x, weight), plain)
        assert torch.equal(gated_linear.gated_linear(some_x, weight, activation="silu"), gated)


@pytest.mark.gpu
def test_on_a_gpu_it_runs_in_a_graph_between_kernels_that_start_early():
    weight = torch.randn(2048, 2048, device="cuda").bfloat16() / 45
    x = torch.randn(1000, 2048, device="cuda").bfloat16()

    def chain():
        y = x
        for _ in range(6):
            y = skinny_linear(y, weight, None, CONFIG, out_dtype=x.dtype)
        return y

    expected, graph = chain(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(5):
        graph.replay()
        assert torch.equal(y, expected)


# --- anywhere


def weight_of(*, outputs=64, inputs=128, dtype=torch.bfloat16):
    return torch.zeros(outputs, inputs, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "weight", "reason"),
    [
        ({"rows": 208}, weight_of(), "16 to 192"),
        ({"rows": 100}, weight_of(), "by 16"),
        ({"num_stages": 1}, weight_of(), "2 to 8"),
        ({"num_stages": 4}, weight_of(), "bytes of shared memory"),
        ({"band": 0}, weight_of(), "less than one tile"),
        ({}, weight_of(inputs=96), "inputs by 64"),
        ({}, weight_of(outputs=56), "outputs by 8"),
        ({}, weight_of(dtype=torch.float32), "must be bfloat16"),
        ({}, weight_of(), "compute capability 9.0"),
    ],
)
def test_what_does_not_fit_says_why(changes, weight, reason):
    config = {**CONFIG, **changes}
    assert reason in unfit_reason(config, weight, gated=True)
    with pytest.raises(ValueError, match="tall_linear: "):
        skinny_linear(torch.zeros(2, weight.shape[1]), weight, None, config, out_dtype=weight.dtype, activation="silu")


@pytest.mark.usefixtures("fresh_loader")
def test_where_it_cannot_run_the_reason_is_logged_once_and_cublas_serves(caplog, monkeypatch):
    loader.warn_unserved.cache_clear()
    monkeypatch.setattr(tuning, "lookup", lambda *args: CONFIG)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert linear.choose_skinny_config("linear", weight_of(), 500) is None
    (record,) = caplog.records
    assert "compute capability 9.0" in record.message
    assert "cuBLAS does" in record.message


def test_every_config_is_within_the_memory_of_a_cta():
    for config in TALL_CONFIGS:
        assert shared_bytes(config) + 2 * 8 * config["num_stages"] <= 227 * 1024, config


@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize("config", [TALL_CONFIGS[0], TALL_CONFIGS[-1]], ids=["large", "small"])
def test_nvrtc_compiles_it(nvrtc, config, gated):
    macros = {"ROWS": config["rows"], "STAGES": config["num_stages"], "GATED": gated, "ACTIVATION": 0, "FLOAT16": gated}
    code = (loader.SOURCE_DIR / f"{module.SOURCE}.cu").read_bytes()
    options = ["--gpu-architecture=sm_90a", "-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
    assert loader.compile_source(code, f"{module.SOURCE}.cu", options).startswith(b"\x7fELF")
