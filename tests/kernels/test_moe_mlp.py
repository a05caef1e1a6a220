from dataclasses import replace
from itertools import product

import pytest
import torch
from pilotfish.kernels.expert_terms import sum_terms
from pilotfish.kernels.grouped_tiles import GroupedConfig
from pilotfish.kernels.moe_gemv import GemvConfig
from pilotfish.kernels.moe_mlp import TOLERANCE, _moe_mlp_triton, moe_mlp, moe_mlp_ref, run_experts
from pilotfish.kernels.moe_routing import route_tokens, route_tokens_ref
from pilotfish.kernels.rms_norm import rms_norm
from pilotfish.kernels.streaming_experts import StreamingConfig
from pilotfish.models.parallel import Parallel
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

# (tokens, hidden, intermediate, experts, top_k)
SMALL = {
    "one": (1, 32, 48, 4, 2),
    "few": (7, 40, 24, 5, 2),
    "empty": (0, 32, 48, 4, 2),
    "one_expert": (20, 32, 16, 1, 1),
    "more_experts_than_tokens": (3, 32, 16, 12, 3),
    "two_tiles": (40, 16, 16, 2, 1),
    "aligned": (3, 32, 64, 4, 2),
}
LARGE = {
    "mixtral_decode": (16, 4096, 1024, 8, 2),
    "qwen3_single": (1, 2048, 768, 128, 8),
    "qwen3_four": (4, 2048, 768, 128, 8),
    "qwen3_decode": (8, 2048, 768, 128, 8),
    "qwen3_decode_128": (128, 2048, 768, 128, 8),
    "qwen3_decode_300": (300, 2048, 768, 128, 8),
    "qwen3_prefill": (3000, 2048, 768, 128, 8),
    "odd_prefill": (1111, 1000, 520, 7, 3),
}
CPU_CASES = {torch.float16: {"few", "empty", "aligned"}}
CUDA_CASES = {torch.float32: {"few", "two_tiles", "qwen3_four"}, torch.float16: {"few", "aligned", "odd_prefill"}}  # compiling


RUN = {"cpu": lambda *args: sum_terms(_moe_mlp_triton(*args)), "cuda": lambda *args: sum_terms(moe_mlp(*args))}


def make(case, device="cpu", dtype=torch.float32):
    num_tokens, hidden, intermediate, num_experts, top_k = case
    x = torch.randn(num_tokens, hidden, device=device, dtype=dtype)
    gate_up = torch.randn(num_experts, 2 * intermediate, hidden, device=device, dtype=dtype) * hidden**-0.5
    down = torch.randn(num_experts, hidden, intermediate, device=device, dtype=dtype) * intermediate**-0.5
    weights, experts = route_tokens_ref(torch.randn(num_tokens, num_experts, device=device), top_k, renormalize=True)
    return x, gate_up, down, weights, experts


def test_reference_equals_transformers():
    config = MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    x = torch.randn(9, 24)
    logits, _, _ = block.gate(x)
    weights, experts = route_tokens_ref(logits, 2, renormalize=True)
    out = moe_mlp_ref(x, block.experts.gate_up_proj.data, block.experts.down_proj.data, weights, experts, "silu")
    torch.testing.assert_close(out, block(x[None])[0], rtol=1e-5, atol=1e-6)


def test_kernel_equals_reference(device, dtype, case):
    arguments = make(case, device, dtype)
    out = RUN[device](*arguments, "silu")
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, moe_mlp_ref(*arguments, "silu"), rtol=rtol, atol=atol)


CONFIGS = [
    GemvConfig(block_n=8, block_k=64, num_warps=4),
    GemvConfig(block_n=16, block_k=16, num_warps=2),
    GroupedConfig(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2),
    GroupedConfig(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=3),
    GroupedConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=2),
    GroupedConfig(block_m=16, block_n=64, block_k=16, num_warps=4, num_stages=3),
    GroupedConfig(block_m=64, block_n=64, block_k=16, num_warps=4, num_stages=3, tma=True),
    GroupedConfig(block_m=64, block_n=32, block_k=32, num_warps=4, num_stages=3, tma=True, persistent=True),
]
EARLY_GEMV = GemvConfig(block_n=2, block_k=256, num_warps=4)
EARLY_GROUPED = GroupedConfig(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=4, prefetch_lines=4)
STREAMING = StreamingConfig(tile=64, rows=8, num_stages=4, programs=50)
TMA = GroupedConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3, tma=True)
LISTED = replace(TMA, persistent=True)
EARLY = list(product((EARLY_GEMV, EARLY_GROUPED, STREAMING), repeat=2))
EARLY += [(EARLY_GROUPED, TMA), (EARLY_GROUPED, LISTED), (STREAMING, LISTED)]
PAIRS = [(config, config) for config in CONFIGS]
PAIRS += [(CONFIGS[0], CONFIGS[3]), (CONFIGS[3], CONFIGS[1]), (CONFIGS[4], CONFIGS[2])]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda config: f"{type(config).__name__[:4]}{config.block_n}")
@pytest.mark.parametrize("sizes", [(7, 40, 24, 3, 2), (38, 32, 64, 2, 1)], ids=["odd", "even"])
def test_every_kernel_serves_any_shape(device, sizes, first, second):
    """Whatever a table says: each kernel computes both GEMMs, for any number of tokens, with some choices of other ranks."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, gate_up, down, weights, experts = make(sizes, device, dtype)
    experts[1::3, 0] = -1
    out = sum_terms(run_experts(x, gate_up, down, weights, experts, "silu", gate_up=first, down=second))
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, moe_mlp_ref(x, gate_up, down, weights, experts, "silu"), rtol=rtol, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 64])
def test_a_captured_layer_follows_its_inputs(num_tokens):
    arguments = make((num_tokens, 256, 128, 16, 4), "cuda", torch.bfloat16)
    RUN["cuda"](*arguments, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = RUN["cuda"](*arguments, "silu")
    for _ in range(3):
        others = make((num_tokens, 256, 128, 16, 4), "cuda", torch.bfloat16)
        for argument, other in zip(arguments, others, strict=True):
            argument.copy_(other)
        graph.replay()
        assert torch.equal(out, RUN["cuda"](*others, "silu"))


@pytest.mark.gpu
@pytest.mark.parametrize("configs", EARLY, ids=lambda configs: "-".join(type(config).__name__[:4] for config in configs))
@pytest.mark.parametrize("num_tokens", [1, 8, 300])
def test_captured_layers_wait_for_each_other(num_tokens, configs):
    """Kernels start while the one before ends: a chain of layers gives the bits of layers run one by one.

    So do layers whose sum and norm are one kernel.
    """
    x, gate_up, down, _, _ = make((num_tokens, 512, 256, 16, 4), "cuda", torch.bfloat16)
    ones = torch.ones(512, device="cuda", dtype=torch.bfloat16)

    def separate(out, residual, *norm):
        return rms_norm(sum_terms(out), *norm, residual_TH=residual)

    def run_layers(pause, add_and_norm):
        y = residual = x
        for _ in range(8):
            weights, experts = route_tokens(y[:, :16], 4, renormalize=True)
            pause()
            out = run_experts(y, gate_up, down, weights, experts, "silu", gate_up=configs[0], down=configs[1])
            pause()
            y, residual = add_and_norm(out, residual, ones, 1e-6)
            pause()
        return y

    expected = run_layers(torch.cuda.synchronize, separate)
    for add_and_norm in (separate, Parallel().sum_and_norm):
        assert torch.equal(run_layers(torch.cuda.synchronize, add_and_norm), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run_layers(lambda: None, add_and_norm)
        for _ in range(5):
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected)


def test_the_other_activation(device):
    arguments = make(SMALL["few"], device)
    expected = moe_mlp_ref(*arguments, "gelu_tanh")
    assert not torch.allclose(expected, moe_mlp_ref(*arguments, "silu"), rtol=0.1, atol=0.01)
    rtol, atol = TOLERANCE[torch.float32]
    torch.testing.assert_close(RUN[device](*arguments, "gelu_tanh"), expected, rtol=rtol, atol=atol)


def test_runs_repeat_bit_by_bit(device, dtype):
    arguments = make((50, 40, 24, 5, 2), device, dtype)
    first = RUN[device](*arguments, "silu")
    assert torch.equal(first, RUN[device](*arguments, "silu"))


@pytest.mark.parametrize("num_tokens", [3, 9])
def test_negative_experts_contribute_nothing(device, dtype, num_tokens):
    x, gate_up, down, weights, experts = make((num_tokens, 32, 16, 4, 2), device, dtype)
    experts[0] = -1
    experts[1:3, 1] = -1
    expected = moe_mlp_ref(x, gate_up, down, weights * (experts >= 0), experts.clamp(min=0), "silu")
    rtol, atol = TOLERANCE[dtype]
    for run in (RUN[device], moe_mlp_ref):
        out = run(x, gate_up, down, weights, experts, "silu")
        assert not out[0].any()
        torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    none = torch.full_like(experts, -1)
    assert not RUN[device](x, gate_up, down, weights, none, "silu").any()


def test_all_tokens_to_one_expert(device, dtype):
    x, gate_up, down, weights, experts = make((50, 32, 16, 6, 1), device, dtype)
    experts[:] = 4
    rtol, atol = TOLERANCE[dtype]
    out = RUN[device](x, gate_up, down, weights, experts, "silu")
    torch.testing.assert_close(out, moe_mlp_ref(x, gate_up, down, weights, experts, "silu"), rtol=rtol, atol=atol)


def test_half_weights_under_float32_activations(device):
    x, gate_up, down, weights, experts = make(SMALL["few"], device)
    gate_up, down = gate_up.half(), down.half()
    rtol, atol = TOLERANCE[torch.float32]
    out = RUN[device](x, gate_up, down, weights, experts, "silu")
    torch.testing.assert_close(out, moe_mlp_ref(x, gate_up, down, weights, experts, "silu"), rtol=rtol, atol=atol)


def test_views_of_wider_tensors(device, dtype):
    x, gate_up, down, weights, experts = make(SMALL["few"], device, dtype)
    wide_x, wide_down = torch.cat([x, x], 1), torch.cat([down, down], 2)
    views = wide_x[:, : x.shape[1]], gate_up, wide_down[:, :, : down.shape[2]], weights, experts
    assert torch.equal(RUN[device](*views, "silu"), RUN[device](x, gate_up, down, weights, experts, "silu"))


def test_padding_rows_change_nothing(device, dtype):
    """A captured decode step has equal rows beyond the real ones."""
    x, gate_up, down, weights, experts = make((5, 32, 16, 4, 2), device, dtype)
    padded = [torch.cat([tensor, tensor[:1].expand(3, -1)]) for tensor in (x, weights, experts)]
    out = RUN[device](padded[0], gate_up, down, padded[1], padded[2], "silu")
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out[:5], moe_mlp_ref(x, gate_up, down, weights, experts, "silu"), rtol=rtol, atol=atol)
    assert torch.equal(out[5:], out[:1].expand(3, -1))


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("x", torch.zeros(3, 9)),
        ("gate_up", torch.zeros(4, 10, 8)),
        ("down", torch.zeros(5, 8, 6)),
        ("weights", torch.zeros(3, 3)),
        ("weights", torch.zeros(3, 2, dtype=torch.float16)),
        ("experts", torch.zeros(3, 2, dtype=torch.int64)),
    ],
)
def test_misfits_are_refused(change, value):
    arguments = {
        "x": torch.zeros(3, 8),
        "gate_up": torch.zeros(4, 12, 8),
        "down": torch.zeros(4, 8, 6),
        "weights": torch.zeros(3, 2),
        "experts": torch.zeros(3, 2, dtype=torch.int32),
    }
    moe_mlp(*arguments.values(), "silu")
    with pytest.raises(ValueError, match="moe_mlp"):
        moe_mlp(*(arguments | {change: value}).values(), "silu")
    with pytest.raises(ValueError, match="activation"):
        moe_mlp(*arguments.values(), "relu")
