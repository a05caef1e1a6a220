"""The CUDA C++ kernel of experts with many pairs: on a GPU against the reference; anywhere, how it is refused and compiled."""

import logging
from itertools import product

import pytest
import torch
from pilotfish.kernels import tall_experts as module
from pilotfish.kernels import tuning
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.expert_terms import sum_terms
from pilotfish.kernels.gated_activation import ACTIVATIONS
from pilotfish.kernels.grouped_tiles import GroupedConfig
from pilotfish.kernels.moe_config import parse_config, table_config
from pilotfish.kernels.moe_gemv import GemvConfig
from pilotfish.kernels.moe_mlp import TOLERANCE, moe_mlp, moe_mlp_ref, run_experts
from pilotfish.kernels.moe_sort import sort_pairs
from pilotfish.kernels.streaming_experts import StreamingConfig, streaming_experts_ref
from pilotfish.kernels.tall_experts import MOST_PAIRS, TallConfig, shared_bytes, tall_experts, unfit_reason

DTYPES = (torch.bfloat16, torch.float16)
CONFIG = TallConfig(most_pairs=192, num_stages=3)
CONFIGS = (
    CONFIG,
    TallConfig(most_pairs=128, num_stages=3),
    TallConfig(most_pairs=96, num_stages=4),
    TallConfig(most_pairs=16, num_stages=2),
)


def route(num_tokens, num_experts, num_choices, which):
    """Experts [T, C]: "others" are of another rank, "few" leaves every second expert none, "one" takes the last."""
    experts = torch.rand(num_tokens, num_experts, device="cuda").topk(num_choices).indices.int()
    if which == "others":
        experts[::3, 0] = -1
        experts[1::4] = -1
    if which == "few" and num_experts > 1:
        experts |= 1
    if which == "one":
        experts[:] = num_experts - 1
    return experts


def assert_close(out, expected):
    rtol, atol = TOLERANCE[out.dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol, equal_nan=True)


def assert_products_are_right(num_tokens, size, dtype, config, which="all", activation="silu", num_experts=12, num_choices=3):
    """Both products, rows sorted and not, written over NaN: what belongs to no expert stays. Twice, to the same bits."""
    (num_inputs, num_outputs), num_pairs = size, num_tokens * num_choices
    order = sort_pairs(route(num_tokens, num_experts, num_choices, which), num_experts)
    scales = torch.rand(num_tokens, num_choices, device="cuda")
    for gated, sorted_rows in product((True, False), (True, False)):
        weight_rows = num_outputs * (2 if gated else 1)
        weight = torch.randn(num_experts, weight_rows, num_inputs, device="cuda", dtype=dtype) * num_inputs**-0.5
        x = torch.randn(num_tokens if gated else num_pairs, num_inputs, device="cuda", dtype=dtype)
        results = [torch.full((num_pairs, num_outputs), float("nan"), device="cuda", dtype=dtype) for _ in range(3)]
        options = {"activation": activation if gated else None, "sorted_rows": sorted_rows}
        streaming_experts_ref(x, weight, None if gated else scales, results[0], *order, **options)
        for y in results[1:]:
            tall_experts(x, weight, None if gated else scales, y, *order, config=config, **options)
        assert_close(results[1], results[0])
        assert torch.equal(results[1].nan_to_num(), results[2].nan_to_num())


@pytest.mark.gpu
def test_on_a_gpu_one_item_one_step():
    """The smallest there is, for whoever looks for a fault."""
    assert_products_are_right(16, (64, 256), torch.bfloat16, CONFIG, num_experts=1, num_choices=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_on_a_gpu_every_number_of_pairs_is_right(config, dtype):
    """All pairs with one expert, of many counts: every instruction's width, items that are full and that are not."""
    for num_tokens in (1, 15, 16, 17, 40, 63, 70, 90, 112, 120, 144, 160, 170, 190, 192, 193, 500, 1500, 5000):
        assert_products_are_right(num_tokens, (192, 136), dtype, config, num_experts=3, num_choices=1, which="one")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["all", "others", "few"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_on_a_gpu_it_equals_the_reference(config, which, dtype):
    """Fewer steps than stages; outputs that fill no item; more bands of outputs than one; more items than CTAs, and fewer."""
    for num_tokens, size in product((5, 300, 2000), ((64, 8), (320, 776), (1024, 3336))):
        assert_products_are_right(num_tokens, size, dtype, config, which)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_gpu_the_activation_is_the_one_asked_for(activation):
    assert_products_are_right(200, (256, 128), torch.bfloat16, CONFIG, "all", activation)


@pytest.mark.gpu
def test_on_a_gpu_the_most_experts_are_right():
    assert_products_are_right(3000, (128, 64), torch.bfloat16, CONFIG, num_experts=module.MAX_EXPERTS, num_choices=8)


GROUPED = GroupedConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3, tma=True, persistent=True)
PARTNERS = [
    (CONFIG, CONFIG),
    (CONFIG, GROUPED),
    (GROUPED, CONFIG),
    (CONFIG, GemvConfig(block_n=4, block_k=64, num_warps=4)),
    (StreamingConfig(tile=128, rows=64, num_stages=4, programs=132), CONFIG),
]


def make_layer(num_tokens, dtype, hidden=512, intermediate=192):
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=dtype)
    gate_up = torch.randn(12, 2 * intermediate, hidden, device="cuda", dtype=dtype) * hidden**-0.5
    down = torch.randn(12, hidden, intermediate, device="cuda", dtype=dtype) * intermediate**-0.5
    return x, gate_up, down, torch.rand(num_tokens, 3, device="cuda"), route(num_tokens, 12, 3, "others")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("configs", PARTNERS, ids=lambda configs: "-".join(type(config).__name__[:4] for config in configs))
def test_on_a_gpu_a_layer_equals_the_reference_whatever_its_partner(configs, dtype):
    for num_tokens in (100, 1500):
        arguments = make_layer(num_tokens, dtype)
        out = sum_terms(run_experts(*arguments, "silu", gate_up=configs[0], down=configs[1]))
        assert_close(out, moe_mlp_ref(*arguments, "silu"))
        for _ in range(3):
            assert torch.equal(sum_terms(run_experts(*arguments, "silu", gate_up=configs[0], down=configs[1])), out)


@pytest.mark.gpu
def test_on_a_gpu_the_table_chooses_it_and_x_may_lie_anywhere(monkeypatch):
    x, *others = make_layer(300, torch.bfloat16)
    expected = sum_terms(run_experts(x, *others, "silu", gate_up=CONFIG, down=CONFIG))
    monkeypatch.setattr(tuning, "lookup", lambda *args: table_config(CONFIG))
    odd = torch.empty(300, 515, device="cuda", dtype=torch.bfloat16)[:, 1:513].copy_(x)
    for some_x in (x, odd):
        assert torch.equal(sum_terms(moe_mlp(some_x, *others, "silu")), expected)


# --- anywhere


def test_a_config_is_read_from_the_table():
    fields = {"kernel": "tall", "most_pairs": 192, "num_stages": 3}
    assert parse_config(fields) == CONFIG
    assert table_config(CONFIG) == fields


def weight_of(*, num_experts=4, outputs=64, inputs=128, dtype=torch.bfloat16):
    return torch.zeros(num_experts, outputs, inputs, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "weight", "reason"),
    [
        ({"most_pairs": 208}, weight_of(), "16 to 192 pairs"),
        ({"most_pairs": 100}, weight_of(), "by 16"),
        ({"num_stages": 1}, weight_of(), "2 to 8 stages"),
        ({"num_stages": 4}, weight_of(), "bytes of shared memory"),
        ({}, weight_of(num_experts=257), "at most 256 experts"),
        ({}, weight_of(inputs=96), "inputs by 64"),
        ({}, weight_of(outputs=56), "outputs by 8"),
        ({}, weight_of(dtype=torch.float16), "x is torch.bfloat16, the weight torch.float16"),
        ({}, weight_of(), "compute capability 9.0"),
    ],
)
def test_what_does_not_fit_says_why(changes, weight, reason):
    config = TallConfig(**vars(CONFIG) | changes)
    assert reason in unfit_reason(config, weight, torch.bfloat16, gated=True)
    x, order = torch.zeros(2, weight.shape[2], dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="tall_experts: "):
        tall_experts(x, weight, None, x, order, order, activation="silu", config=config, sorted_rows=True)


@pytest.mark.usefixtures("fresh_loader")
def test_where_it_cannot_run_the_reason_is_logged_once(caplog):
    loader.warn_unserved.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not module.serves(CONFIG, weight_of(), torch.bfloat16, gated=False)
    (record,) = caplog.records
    assert "compute capability 9.0" in record.message


def test_all_memory_of_a_cta_is_within_the_limit_of_the_hardware():
    """Static and dynamic: 227 KB. The static ones: pairs and scales, how experts are cut into items, barriers."""
    static = (
        2 * 2 * MOST_PAIRS * (4 + 4) + 2 * 4 * (module.MAX_EXPERTS + 1) + 3 * module.MAX_EXPERTS + 2 * 8 * CONFIG.num_stages
    )
    assert shared_bytes(CONFIG) + static <= 227 * 1024


@pytest.mark.parametrize(
    "macros",
    [
        {"PAIRS": 192, "STAGES": 3, "IN_ORDER": 0, "GATED": 1, "ACTIVATION": 0, "FLOAT16": 0},
        {"PAIRS": 96, "STAGES": 4, "IN_ORDER": 1, "GATED": 0, "ACTIVATION": 0, "FLOAT16": 1},
    ],
    ids=str,
)
def test_nvrtc_compiles_it(nvrtc, macros):
    code = (loader.SOURCE_DIR / f"{module.SOURCE}.cu").read_bytes()
    options = ["--gpu-architecture=sm_90a", "-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
    assert loader.compile_source(code, f"{module.SOURCE}.cu", options).startswith(b"\x7fELF")
