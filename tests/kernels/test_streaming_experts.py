"""The CUDA C++ kernel of experts: on a GPU against the reference; anywhere, how it is chosen, refused and compiled."""

import logging
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from pilotfish.kernels import streaming_experts as module
from pilotfish.kernels import tuning
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.expert_terms import sum_terms
from pilotfish.kernels.gated_activation import ACTIVATIONS
from pilotfish.kernels.grouped_tiles import GroupedConfig
from pilotfish.kernels.moe_config import MoeSizes, choose_config, parse_config, rule, table_config
from pilotfish.kernels.moe_gemv import GemvConfig
from pilotfish.kernels.moe_mlp import TOLERANCE, moe_mlp, moe_mlp_ref, run_experts
from pilotfish.kernels.moe_sort import sort_pairs, sort_pairs_ref
from pilotfish.kernels.streaming_experts import (
    ROWS,
    TILES,
    Routing,
    StreamingConfig,
    serves,
    shared_bytes,
    streaming_experts,
    streaming_experts_ref,
    unfit_reason,
)

NUM_EXPERTS, NUM_CHOICES = 12, 3
DTYPES = (torch.bfloat16, torch.float16)
TOKENS = (1, 3, 8, 40, 128, 500)
CONFIG = StreamingConfig(tile=128, rows=8, num_stages=6, programs=20)


def choose(num_tokens, which, device):
    """Experts [T, C]: the choices of a token differ, but for "one"."""
    experts = torch.rand(num_tokens, NUM_EXPERTS, device=device).topk(NUM_CHOICES).indices.int()
    if which == "others":  # of another rank
        experts[::2, 1] = -1
        experts[1::4] = -1
    if which == "few":  # the even experts have none
        experts |= 1
    if which == "one":
        experts[:] = 5
    return experts


def make(num_tokens, size, dtype, device="cuda", which="all"):
    """x, gate_up, down, weights, experts of a layer of `size` (H, F)."""
    hidden, intermediate = size
    x = torch.randn(num_tokens, hidden, device=device, dtype=dtype)
    gate_up = torch.randn(NUM_EXPERTS, 2 * intermediate, hidden, device=device, dtype=dtype) * hidden**-0.5
    down = torch.randn(NUM_EXPERTS, hidden, intermediate, device=device, dtype=dtype) * intermediate**-0.5
    weights = torch.rand(num_tokens, NUM_CHOICES, device=device)
    return x, gate_up, down, weights, choose(num_tokens, which, device)


def assert_close(out, expected, equal_nan=False):
    rtol, atol = TOLERANCE[out.dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol, equal_nan=equal_nan)


# --- on a GPU


def run(x, weight, scales, order, *, config, routing, sorted_rows, activation):
    """y, written over NaN: what belongs to no expert stays."""
    num_pairs, num_outputs = order[0].shape[0], weight.shape[1] // (2 if activation else 1)
    y = torch.full((num_pairs, num_outputs), float("nan"), device="cuda", dtype=x.dtype)
    arguments = (x, weight, scales, y, *order)
    if routing is None:
        streaming_experts_ref(*arguments, activation=activation, sorted_rows=sorted_rows)
    else:
        streaming_experts(*arguments, activation=activation, config=config, routing=routing, sorted_rows=sorted_rows)
    return y


def assert_products_are_right(num_tokens, size, dtype, config, which, activation="silu"):
    """Both products with every Routing, rows sorted and not, on inputs of their own."""
    (num_inputs, num_outputs), num_pairs = size, num_tokens * NUM_CHOICES
    order = sort_pairs(choose(num_tokens, which, "cuda"), NUM_EXPERTS)
    scales = torch.rand(num_tokens, NUM_CHOICES, device="cuda")
    for gated in (True, False):
        weight_rows = num_outputs * (2 if gated else 1)
        weight = torch.randn(NUM_EXPERTS, weight_rows, num_inputs, device="cuda", dtype=dtype) * num_inputs**-0.5
        x = torch.randn(num_tokens if gated else num_pairs, num_inputs, device="cuda", dtype=dtype)
        arguments = (x, weight, None if gated else scales, order)
        for sorted_rows in (True, False):
            options = {"config": config, "sorted_rows": sorted_rows, "activation": activation if gated else None}
            expected = run(*arguments, routing=None, **options)
            for routing in Routing:
                assert_close(run(*arguments, routing=routing, **options), expected, equal_nan=True)


@pytest.mark.gpu
def test_on_a_gpu_one_pair_one_step():
    """The smallest there is, for whoever looks for a fault."""
    assert_products_are_right(1, (64, 64), torch.bfloat16, StreamingConfig(tile=64, rows=8, num_stages=2, programs=1), "all")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tile", TILES)
def test_on_a_gpu_every_tile_is_right(tile, rows, dtype):
    """One expert with all pairs takes several passes, one without any none; programs take many items, or one."""
    for num_tokens, which in product(TOKENS, ("all", "others", "few", "one")):
        for size, programs in (((192, 68), 5), ((1024, 320), 1000)):  # fewer steps than stages and a tail; many
            config = StreamingConfig(tile=tile, rows=rows, num_stages=3, programs=programs)
            assert_products_are_right(num_tokens, size, dtype, config, which)


@pytest.mark.gpu
@pytest.mark.parametrize("num_stages", [2, 3, 5, 8, 12])
def test_on_a_gpu_any_number_of_stages_is_right(num_stages):
    for programs in (1, 3, 17, 132):
        config = StreamingConfig(tile=64, rows=16, num_stages=num_stages, programs=programs)
        assert_products_are_right(21, (448, 200), torch.bfloat16, config, "others")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_gpu_the_activation_is_the_one_asked_for(activation):
    assert_products_are_right(9, (256, 128), torch.bfloat16, CONFIG, "all", activation)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["all", "one"])
def test_on_a_gpu_the_same_bits_again_however_it_is_run(which):
    x, gate_up, _, _, experts = make(40, (1024, 256), torch.bfloat16, which=which)
    order = sort_pairs(experts, NUM_EXPERTS)
    options = {"sorted_rows": True, "activation": "silu"}
    y = run(x, gate_up, None, order, config=CONFIG, routing=Routing.AFTER_WAIT, **options)
    for _ in range(20):
        for routing in Routing:
            assert torch.equal(run(x, gate_up, None, order, config=CONFIG, routing=routing, **options), y)
    for config in (StreamingConfig(tile=64, rows=16, num_stages=3, programs=7), StreamingConfig(**vars(CONFIG) | {"rows": 64})):
        assert_close(run(x, gate_up, None, order, config=config, routing=Routing.AFTER_WAIT, **options), y)


@pytest.mark.gpu
def test_on_a_gpu_x_may_lie_anywhere():
    x, gate_up, down, weights, experts = make(7, (256, 128), torch.bfloat16)
    expected = sum_terms(run_experts(x, gate_up, down, weights, experts, "silu", gate_up=CONFIG, down=CONFIG))
    wide = torch.empty(7, 259, device="cuda", dtype=torch.bfloat16)
    for start in (0, 1):  # its rows, or all of it, at odd places
        other = wide[:, start : start + 256].copy_(x)
        out = run_experts(other, gate_up, down, weights, experts, "silu", gate_up=CONFIG, down=CONFIG)
        assert torch.equal(sum_terms(out), expected)


GEMV = GemvConfig(block_n=4, block_k=64, num_warps=4)
GROUPED = GroupedConfig(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=3, prefetch_lines=2)
LISTED = GroupedConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3, tma=True, persistent=True)
PARTNERS = [(CONFIG, CONFIG), (CONFIG, GEMV), (GEMV, CONFIG), (CONFIG, GROUPED), (GROUPED, CONFIG), (CONFIG, LISTED)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("configs", PARTNERS, ids=lambda configs: "-".join(type(config).__name__[:4] for config in configs))
def test_on_a_gpu_a_layer_equals_the_reference_whatever_its_partner(configs, dtype):
    for num_tokens, which in product(TOKENS, ("all", "others", "few", "one")):
        arguments = make(num_tokens, (512, 192), dtype, which=which)
        out = sum_terms(run_experts(*arguments, "silu", gate_up=configs[0], down=configs[1]))
        assert_close(out, moe_mlp_ref(*arguments, "silu"))
        for _ in range(3):
            assert torch.equal(sum_terms(run_experts(*arguments, "silu", gate_up=configs[0], down=configs[1])), out)


@pytest.mark.gpu
def test_on_a_gpu_the_table_chooses_it(monkeypatch):
    arguments = make(8, (512, 192), torch.bfloat16)
    expected = sum_terms(run_experts(*arguments, "silu", gate_up=CONFIG, down=CONFIG))
    monkeypatch.setattr(tuning, "lookup", lambda *args: table_config(CONFIG))
    assert torch.equal(sum_terms(moe_mlp(*arguments, "silu")), expected)
    odd = make(8, (40, 24), torch.bfloat16)  # the rule's kernels serve
    assert_close(sum_terms(moe_mlp(*odd, "silu")), moe_mlp_ref(*odd, "silu"))


# --- anywhere


@pytest.mark.parametrize("which", ["all", "others", "few", "one"])
@pytest.mark.parametrize("sorted_rows", [True, False])
def test_two_products_of_the_reference_are_a_layer(sorted_rows, which):
    x, gate_up, down, weights, experts = make(9, (24, 16), torch.float32, "cpu", which)
    pairs, starts = sort_pairs_ref(experts, NUM_EXPERTS)
    h, y = torch.full((experts.numel(), 16), float("nan")), torch.zeros(experts.numel(), 24)
    streaming_experts_ref(x, gate_up, None, h, pairs, starts, activation="silu", sorted_rows=sorted_rows)
    streaming_experts_ref(h, down, weights, y, pairs, starts, activation=None, sorted_rows=sorted_rows)
    out = y.view(9, NUM_CHOICES, 24).sum(dim=1)
    torch.testing.assert_close(out, moe_mlp_ref(x, gate_up, down, weights, experts, "silu"), rtol=1e-5, atol=1e-6)


def test_a_config_is_read_from_the_table():
    fields = {"kernel": "streaming", "tile": 128, "rows": 8, "num_stages": 6, "programs": 20}
    assert parse_config(fields) == CONFIG
    assert table_config(CONFIG) == fields


def test_every_tile_fits_with_three_stages_and_none_with_all():
    for tile, rows in product(TILES, ROWS):
        assert shared_bytes(StreamingConfig(tile=tile, rows=rows, num_stages=3, programs=1)) <= loader.MAX_SHARED_BYTES
        most = StreamingConfig(tile=tile, rows=rows, num_stages=module.MAX_STAGES, programs=1)
        assert "bytes of shared memory" in unfit_reason(most, weight_of(), torch.bfloat16, gated=True)


def weight_of(*, num_experts=4, outputs=64, inputs=128, dtype=torch.bfloat16):
    return torch.zeros(num_experts, outputs, inputs, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "weight", "reason"),
    [
        ({"tile": 192}, weight_of(), "is not of tiles"),
        ({"rows": 128}, weight_of(), "is not of tiles"),
        ({"num_stages": 1}, weight_of(), "2 to 32 stages"),
        ({}, weight_of(num_experts=513), "at most 512 experts"),
        ({}, weight_of(inputs=96), "inputs by 64"),
        ({}, weight_of(outputs=60), "outputs by 4"),
        ({}, weight_of(dtype=torch.float16), "x is torch.bfloat16, the weight torch.float16"),
        ({}, weight_of(inputs=192)[:, :, :128], "contiguous"),
        ({}, weight_of(), "compute capability 9.0"),
    ],
)
def test_what_does_not_fit_says_why(changes, weight, reason):
    config = StreamingConfig(**vars(CONFIG) | changes)
    assert reason in unfit_reason(config, weight, torch.bfloat16, gated=True)
    x, order = torch.zeros(2, weight.shape[2], dtype=torch.bfloat16), sort_pairs_ref(torch.zeros(2, 1), weight.shape[0])
    with pytest.raises(ValueError, match="streaming_experts: "):
        run_on_cpu(x, weight, order, config)


def run_on_cpu(x, weight, order, config):
    y = torch.zeros(2, weight.shape[1] // 2, dtype=x.dtype)
    options = {"activation": "silu", "config": config, "routing": Routing.AFTER_WAIT, "sorted_rows": False}
    streaming_experts(x, weight, None, y, *order, **options)


SIZES = MoeSizes(num_tokens=8, num_choices=2, num_experts=4, hidden=128, intermediate=32)
X = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, element_size=lambda: 2)  # as far as a choice looks


@pytest.fixture
def _table_of_streaming(monkeypatch):
    monkeypatch.setattr(tuning, "lookup", lambda *args: table_config(CONFIG))
    loader.warn_unserved.cache_clear()


@pytest.mark.usefixtures("_table_of_streaming", "fresh_loader")
def test_where_it_cannot_run_the_rule_serves_and_the_reason_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choose_config("moe_gate_up", SIZES, X, weight_of()) == rule("moe_gate_up", SIZES, element_size=2)
            assert choose_config("moe_down", SIZES, X, weight_of()) == rule("moe_down", SIZES, element_size=2)
    (record,) = caplog.records
    assert "compute capability 9.0" in record.message


@pytest.mark.usefixtures("_table_of_streaming", "fresh_loader")
def test_without_a_compiler_the_rule_serves_and_there_is_one_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(loader, "can_run_on", lambda device: True)
    with caplog.at_level(logging.WARNING):
        for op in ("moe_gate_up", "moe_down"):
            assert choose_config(op, SIZES, X, weight_of()) == rule(op, SIZES, element_size=2)
    (record,) = caplog.records
    assert "no NVRTC" in record.message


@pytest.mark.usefixtures("_table_of_streaming", "fresh_loader")
def test_where_it_can_run_the_table_is_followed(monkeypatch):
    monkeypatch.setattr(loader, "can_run_on", lambda device: True)
    monkeypatch.setattr(loader, "compile_source", lambda code, name, options: b"cubin")
    assert serves(CONFIG, weight_of(), torch.bfloat16, gated=True)
    assert choose_config("moe_down", SIZES, X, weight_of()) == CONFIG


def test_nvrtc_compiles_it(nvrtc):
    code = (loader.SOURCE_DIR / f"{module.SOURCE}.cu").read_bytes()
    for macros in ({"ROWS": 8, "TILE": 64, "GATED": 0, "FLOAT16": 0}, {"ROWS": 64, "TILE": 256, "GATED": 1, "FLOAT16": 1}):
        options = ["--gpu-architecture=sm_90a", "-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
        assert loader.compile_source(code, f"{module.SOURCE}.cu", options).startswith(b"\x7fELF")
