"""The rest of a layer in one kernel: on a GPU what the separate ops answer; anywhere what it fits and how it shares memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pilotfish.kernels import between_attentions as module
from pilotfish.kernels import tuning
from pilotfish.kernels.between_attentions import (
    LayerWeights,
    Next,
    Router,
    choose_config,
    chunks_of,
    fused_layer,
    new_counter,
    plan_memory,
    separate_layer,
    unfit_reason,
)
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.expert_terms import sum_terms

CONFIG = {"kernel": "fused", "max_in_flight": 2, "prefetches": 0}
# Errors of norms: two ways to add may round a number of s to neighbours, which goes through two norms and three products.
ALLOWED_ERROR = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
# (H, Q, F, E, C, N)
QWEN3_06B, QWEN3_8B, QWEN3_30B = (
    (1024, 2048, 3072, 1, 1, 4096),
    (4096, 4096, 12288, 1, 1, 6144),
    (2048, 4096, 768, 128, 8, 5120),
)
SMALL, SMALL_SPARSE = (512, 256, 768, 1, 1, 1280), (256, 512, 256, 32, 2, 768)


def make(sizes, num_rows, dtype=torch.bfloat16, device="cpu", *, renormalize=True, activation="silu"):
    """(attended, residual, layer, next)."""
    hidden, attended_size, intermediate, num_experts, choices, num_outputs = sizes
    generator = torch.Generator(device).manual_seed(num_rows)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)

    router = Router(random(num_experts, hidden, scale=hidden**-0.5), choices, renormalize) if num_experts > 1 else None
    layer = LayerWeights(
        output_HQ=random(hidden, attended_size, scale=attended_size**-0.5),
        norm_H=1 + random(hidden, scale=0.1),
        eps=1e-6,
        gate_up_EUH=random(num_experts, 2 * intermediate, hidden, scale=hidden**-0.5),
        down_EHF=random(num_experts, hidden, intermediate, scale=intermediate**-0.5),
        activation=activation,
        router=router,
    )
    following = Next(1 + random(hidden, scale=0.1), 1e-5, random(num_outputs, hidden, scale=hidden**-0.5))
    return random(num_rows, attended_size), random(num_rows, hidden), layer, following


def error(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [SMALL, SMALL_SPARSE, QWEN3_06B, QWEN3_8B, QWEN3_30B], ids=str)
def test_on_a_gpu_it_equals_the_separate_ops(sizes, dtype):
    counter = new_counter(torch.device("cuda"))
    for num_rows in (1, 2, 3) if sizes == QWEN3_8B else (1, 2, 3, 8):
        for is_last, config in (
            (False, CONFIG),
            (True, CONFIG),
            (False, CONFIG | {"max_in_flight": 8, "prefetches": 10000}),
        ):
            attended, residual, layer, following = make(sizes, num_rows, dtype, "cuda", renormalize=num_rows % 2 == 0)
            after = None if is_last else following
            y, new_residual = fused_layer(attended, residual, layer, after, counter=counter, config=config)
            expected_y, expected_residual = separate_layer(attended, residual, layer, after)
            what = f"{num_rows} rows, last {is_last}, {config}"
            assert error(new_residual, expected_residual) < ALLOWED_ERROR[dtype], what
            assert error(y, sum_terms(expected_y)) < 2 * ALLOWED_ERROR[dtype], what


@pytest.mark.gpu
def test_on_a_gpu_gelu_and_experts_of_equal_logits():
    """Of equal logits the lowest experts are chosen, by every row."""
    attended, residual, layer, following = make(SMALL_SPARSE, 8, device="cuda", activation="gelu_tanh")
    layer.router.weight_EH[:] = layer.router.weight_EH[3].clone()
    y, _ = fused_layer(attended, residual, layer, following, counter=new_counter(y_device := attended.device), config=CONFIG)
    assert y.device == y_device
    assert error(y, separate_layer(attended, residual, layer, following)[0]) < 2e-2
    two = replace(layer, gate_up_EUH=layer.gate_up_EUH.clone(), down_EHF=layer.down_EHF.clone())
    two.gate_up_EUH[2:], two.down_EHF[2:] = 0, 0
    assert torch.equal(fused_layer(attended, residual, two, following, counter=new_counter(y_device), config=CONFIG)[0], y)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [QWEN3_06B, QWEN3_30B], ids=str)
def test_on_a_gpu_a_chain_in_a_graph_gives_the_same_bits_again(sizes):
    """Twenty layers after one another, each of what the one before it left, with kernels between that start early too."""
    num_rows = 3
    attended, residual, layer, following = make(sizes, num_rows, device="cuda")
    attended_size, num_outputs = attended.shape[1], following.weight_NH.shape[0]
    counter = new_counter(attended.device)

    def chain(first, stream):
        for _ in range(20):
            y, stream = fused_layer(first, stream, layer, following, counter=counter, config=CONFIG)
            first = y.repeat(1, -(-attended_size // num_outputs))[:, :attended_size].contiguous()
        return y, stream

    expected = chain(attended, residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(attended, residual)
    for _ in range(50):
        graph.replay()
        assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


# --- anywhere


@pytest.mark.parametrize(
    ("changes", "num_rows", "reason"),
    [
        ({}, 9, "9 rows: it takes 1 to 8"),
        ({"hidden": 384}, 1, "not multiples of 256"),
        ({"experts": 96, "choices": 8}, 1, "8 of 96 experts"),
        ({"experts": 64, "choices": 16}, 5, "5 rows of 16 choices"),
        (
            {"intermediate": 4352, "experts": 32, "choices": 2},
            1,
            "4352 inputs of an expert do not divide into 8 chunks of up to 1024",
        ),
        ({"activation": "relu"}, 1, "activation 'relu'"),
        ({"dtype": torch.float32}, 1, "all must be bfloat16 or all float16"),
        ({}, 1, "compute capability 9.0"),
    ],
)
def test_what_does_not_fit_says_why(changes, num_rows, reason):
    intermediate, experts = changes.get("intermediate", 256), changes.get("experts", 1)
    sizes = (changes.get("hidden", 256), 256, intermediate, experts, changes.get("choices", 1), 512)
    dtype, activation = changes.get("dtype", torch.bfloat16), changes.get("activation", "silu")
    attended, residual, layer, following = make(sizes, num_rows, dtype, activation=activation)
    assert reason in unfit_reason(num_rows, layer, following)
    with pytest.raises(ValueError, match="between_attentions: "):
        fused_layer(attended, residual, layer, following, counter=new_counter(attended.device), config=CONFIG)


def test_weights_that_do_not_fit_each_other_say_so():
    _, _, layer, following = make(SMALL, 1)
    assert "do not fit" in unfit_reason(1, replace(layer, norm_H=layer.norm_H[1:]), following)
    assert "do not fit" in unfit_reason(1, layer, replace(following, weight_NH=following.weight_NH[:, 1:]))
    strided = replace(layer, output_HQ=layer.output_HQ.T.contiguous().T)
    assert "gaps" in unfit_reason(1, strided, following)


def test_only_the_table_chooses_it_and_no_cpu(monkeypatch):
    _, _, layer, following = make(SMALL, 1)
    monkeypatch.setattr(tuning, "lookup", lambda *args: CONFIG)
    assert choose_config(layer, following, 1) is None


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [(QWEN3_06B, (8, 4, 12, 4)), (QWEN3_8B, (16, 16, 16, 16)), (QWEN3_30B, (16, 8, 12, 8)), (SMALL, (1, 2, 3, 2))],
    ids=str,
)
def test_chunks_are_an_equal_number_for_each_team(sizes, chunks):
    assert chunks_of(sizes[:5]) == chunks


@pytest.mark.parametrize(("sizes", "most_rows"), [(QWEN3_06B, 8), (QWEN3_8B, 6), (QWEN3_30B, 8)], ids=str)
def test_memory_holds_whole_rows_and_a_ring_of_some_chunks(sizes, most_rows):
    for num_rows in range(1, 9):
        memory = plan_memory(num_rows, sizes[:5])
        assert memory.holds_chunks(sizes[:5]) == (num_rows <= most_rows)
        assert memory.x_bytes >= num_rows * sizes[4] * (2 * sizes[2] + 16)
        assert memory.ring_bytes % 1024 == memory.x_bytes % 128 == 0
        assert 1024 + memory.ring_bytes + memory.x_bytes + 2 * 4096 <= memory.all_bytes < loader.CTA_SHARED_BYTES


@pytest.mark.parametrize("sizes", [SMALL, QWEN3_8B, QWEN3_30B, (256, 256, 256, 256, 2, 512)], ids=str)
def test_nvrtc_compiles_it(nvrtc, sizes):
    code = (loader.SOURCE_DIR / f"{module.SOURCE}.cu").read_bytes()
    names = ("HIDDEN", "ATTENDED", "INTERMEDIATE", "EXPERTS", "CHOICES", "OUT_SIZE")
    values = dict(zip(names, sizes, strict=True)) | {"EXPERTS": sizes[3] if sizes[3] > 1 else 0, "CTAS": 132, "FLOAT16": 0}
    options = loader._compile_options(tuple(values.items()))
    assert loader.compile_source(code, f"{module.SOURCE}.cu", options).startswith(b"\x7fELF")
