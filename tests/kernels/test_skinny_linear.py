"""The kernels for few rows against the references, every kernel and way to split, plain and gated, whatever the sizes."""

import pytest
import torch
from pilotfish.kernels import gated_linear as gated_linear_module
from pilotfish.kernels import linear as linear_module
from pilotfish.kernels.gated_linear import gated_linear_ref
from pilotfish.kernels.linear import linear_ref
from pilotfish.kernels.skinny_linear import MAX_GEMV_INPUTS, default_gemv_config, fits, skinny_linear

# (rows, inputs, outputs): outputs even, for half of them are gates.
SMALL = {
    "one_row": (1, 64, 32),
    "single_numbers": (1, 1, 2),
    "ragged": (3, 100, 22),
    "many_blocks": (17, 100, 36),
    "no_rows": (0, 64, 32),
}
CPU_CASES = {torch.float16: {"ragged"}}
LARGE = {"row": (1, 4096, 1026), "gate_up": (8, 4096, 24576), "down": (33, 3072, 1030)}
CONFIGS = {
    "gemv_row": {"kernel": "gemv", "block_n": 1, "num_warps": 4},
    "gemv_rows": {"kernel": "gemv", "block_n": 4, "num_warps": 8},
    "skinny": {"kernel": "skinny", "block_n": 16, "block_k": 64, "split_k": 1, "num_warps": 4, "num_stages": 3},
    "skinny_wide": {"kernel": "skinny", "block_n": 64, "block_k": 128, "split_k": 1, "num_warps": 4, "num_stages": 2},
    "skinny_split": {"kernel": "skinny", "block_n": 32, "block_k": 32, "split_k": 3, "num_warps": 4, "num_stages": 2},
}
EARLY = {f"{name}_early": {**CONFIGS[name], "early_start": True} for name in ("gemv_row", "skinny", "skinny_split")}
# numpy, under the interpreter, warns where exp(-gate) overflows to the infinity that the sigmoid needs.
pytestmark = pytest.mark.filterwarnings("ignore:overflow")


def make(case, dtype, device):
    """x and weight are views into wider tensors: their rows are not contiguous."""
    rows, inputs, outputs = case
    x = torch.randn(rows, inputs + 24, device=device, dtype=dtype)[:, 8 : inputs + 8]
    weight = (torch.randn(outputs, inputs + 16, device=device) / inputs**0.5).to(dtype)[:, :inputs]
    return x, weight, torch.randn(outputs, device=device, dtype=dtype)


def skip_what_is_not_for(config, dtype, device, num_rows=1, num_inputs=1):
    if not fits(config, num_rows, num_inputs):
        pytest.skip("beyond the kernel's limits")
    if config["kernel"] == "skinny" and dtype == torch.float32 and device == "cuda":
        pytest.skip("tensor cores take 16-bit numbers")


def assert_close(y, expected, tolerance):
    assert y.dtype == expected.dtype
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_linear_equals_reference(device, dtype, case, config):
    skip_what_is_not_for(config, dtype, device, *case[:2])
    x, weight, bias = make(case, dtype, device)
    for some_bias in (None, bias):
        y = skinny_linear(x, weight, some_bias, config, out_dtype=dtype)
        assert_close(y, linear_ref(x, weight, some_bias), linear_module.TOLERANCE[dtype])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float32_output_has_no_rounding(device, dtype, case, config):
    skip_what_is_not_for(config, dtype, device, *case[:2])
    x, weight, bias = make(case, dtype, device)
    y = skinny_linear(x, weight, bias, config, out_dtype=torch.float32)
    assert_close(y, linear_ref(x, weight, bias, out_dtype=torch.float32), linear_module.TOLERANCE[torch.float32])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gated_linear_equals_reference(device, dtype, case, config):
    skip_what_is_not_for(config, dtype, device, *case[:2])
    assert_gated_linear_is_right(*make(case, dtype, device), config, "silu")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_activation_is_the_one_asked_for(device, dtype, config):
    skip_what_is_not_for(config, dtype, device)
    x, weight, _ = make((2, 40, 22), dtype, device)
    assert_gated_linear_is_right(x, weight, None, config, "gelu_tanh")


def assert_gated_linear_is_right(x, weight, bias, config, activation):
    y = skinny_linear(x, weight, bias, config, out_dtype=x.dtype, activation=activation)
    assert_close(y, gated_linear_ref(x, weight, bias, activation=activation), gated_linear_module.TOLERANCE[x.dtype])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_same_bits_again_and_whatever_the_other_rows_hold(device, dtype, config):
    skip_what_is_not_for(config, dtype, device)
    x, weight, bias = make((5, 200, 22), dtype, device)
    y = skinny_linear(x, weight, bias, config, out_dtype=dtype)
    assert torch.equal(skinny_linear(x, weight, bias, config, out_dtype=dtype), y)
    others = x.clone()
    others[[0, 1, 3, 4]] *= -3
    assert torch.equal(skinny_linear(others, weight, bias, config, out_dtype=dtype)[2], y[2])
    if config["kernel"] == "gemv":
        assert torch.equal(skinny_linear(x[2:3], weight, bias, config, out_dtype=dtype), y[2:3])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_nothing_is_written_outside_the_output(device, dtype, config, monkeypatch):
    skip_what_is_not_for(config, dtype, device)
    x, weight, bias = make((3, 40, 22), dtype, device)
    guarded = torch.full((5, 22), 7.0, device=device, dtype=dtype)
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, **kw: guarded[1:4] if shape == (3, 22) else empty(*shape, **kw))
        skinny_linear(x, weight, bias, config, out_dtype=dtype)
    assert_close(guarded[1:4], linear_ref(x, weight, bias), linear_module.TOLERANCE[dtype])
    assert bool((guarded[[0, 4]] == 7).all())


@pytest.mark.gpu
@pytest.mark.parametrize("config", (CONFIGS | EARLY).values(), ids=CONFIGS | EARLY)
def test_a_chain_in_a_cuda_graph_equals_the_same_calls_one_by_one(config):
    """An early start must wait for what it reads, and for the readers of the memory that it writes."""
    weights = [torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) / 45 for _ in range(20)]
    x = torch.randn(2, 2048, device="cuda", dtype=torch.bfloat16)

    def chain():
        y = x
        for weight in weights:
            y = skinny_linear(y, weight, None, config, out_dtype=torch.bfloat16)
        return y

    expected = x
    for weight in weights:
        reference = linear_ref(expected, weight)
        expected = skinny_linear(expected, weight, None, config, out_dtype=torch.bfloat16)
        assert_close(expected, reference, linear_module.TOLERANCE[torch.bfloat16])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(50):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


def test_limits():
    assert fits(default_gemv_config(MAX_GEMV_INPUTS), 1, MAX_GEMV_INPUTS)
    assert not fits(default_gemv_config(MAX_GEMV_INPUTS), 1, MAX_GEMV_INPUTS + 1)
    assert not fits(default_gemv_config(64), 1, 0)
    assert fits(CONFIGS["skinny"], 64, 100_000)
    assert not fits(CONFIGS["skinny"], 65, 64)
    assert not fits({"kernel": "cublas"}, 1, 64)


@pytest.mark.parametrize("num_inputs", [1, 64, 576, 1024, 2048, 4096, 12288, MAX_GEMV_INPUTS])
def test_the_default_tile_is_not_beyond_a_program_s_registers(num_inputs):
    config = default_gemv_config(num_inputs)
    weights_a_thread = config["block_n"] * num_inputs / (32 * config["num_warps"])
    assert weights_a_thread <= 64
    assert config["num_warps"] in (4, 8, 16)
