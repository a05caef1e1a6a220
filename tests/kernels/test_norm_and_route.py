"""Norm, router and choice in one op: the three ops anywhere, and one kernel on a GPU that equals them but for rounded sums."""

import logging

import pytest
import torch
from pilotfish.kernels import norm_and_route as module
from pilotfish.kernels import rms_norm as rms_norm_module
from pilotfish.kernels import tuning
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.linear import linear_ref
from pilotfish.kernels.moe_routing import route_tokens_ref
from pilotfish.kernels.norm_and_route import fused_norm_and_route, norm_and_route, separate_norm_and_route, unfit_reason
from pilotfish.kernels.rms_norm import rms_norm_ref

EPS = 1e-6


def make(num_tokens, hidden, num_experts, dtype, device):
    """x, residual, weight of the norm, eps, router."""
    x, residual = torch.randn(2, num_tokens, hidden, device=device).to(dtype)
    gain = torch.randn(hidden, device=device).to(dtype)
    return x, residual, gain, EPS, (torch.randn(num_experts, hidden, device=device) * hidden**-0.5).to(dtype)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("hidden", "num_experts", "top_k"), [(2048, 64, 1), (2048, 128, 8), (2048, 256, 32), (4096, 128, 10)])
def test_on_a_gpu_it_equals_the_references(hidden, num_experts, top_k, renormalize, dtype):
    """Two orders of adding may round a logit to neighbours; so a choice is right if none that was passed over is larger."""
    for num_tokens in (1, 2, 7, 17, 33, 128):
        arguments = make(num_tokens, hidden, num_experts, dtype, "cuda")
        y, total, weights, experts = fused_norm_and_route(*arguments, top_k, renormalize=renormalize)
        x, residual, gain, _, router = arguments
        expected_y, expected_total = rms_norm_ref(x, gain, EPS, residual_TH=residual)
        assert torch.equal(total, expected_total)
        rtol, atol = rms_norm_module.TOLERANCE[dtype]
        torch.testing.assert_close(y, expected_y, rtol=rtol, atol=atol)
        logits = linear_ref(y, router).float()
        chosen = logits.gather(1, experts.long())
        ulp = float(torch.finfo(dtype).eps * logits.abs().amax())
        others = logits.scatter(1, experts.long(), -float("inf"))
        assert bool((chosen.amin(1) >= others.amax(1) - ulp).all())
        assert bool((chosen.diff(dim=1) <= ulp).all())
        assert bool(experts.sort(dim=1).values.diff(dim=1).ne(0).all())
        exact = chosen.softmax(1) if renormalize else logits.softmax(1).gather(1, experts.long())
        torch.testing.assert_close(weights, exact, rtol=4 * ulp, atol=1e-6)


@pytest.mark.gpu
def test_on_a_gpu_of_equal_logits_the_lowest_expert_comes_first():
    x, residual, gain, eps, router = make(3, 2048, 128, torch.bfloat16, "cuda")
    router[:] = router[5].clone()
    _, _, weights, experts = fused_norm_and_route(x, residual, gain, eps, router, 8, renormalize=True)
    assert experts.tolist() == [list(range(8))] * 3
    torch.testing.assert_close(weights, torch.full((3, 8), 0.125, device="cuda"))


@pytest.mark.gpu
def test_on_a_gpu_the_same_bits_again_alone_in_a_batch_and_in_a_graph(monkeypatch):
    arguments = make(9, 2048, 128, torch.bfloat16, "cuda")
    monkeypatch.setattr(tuning, "lookup", lambda *args: {"kernel": "fused"})
    expected = norm_and_route(*arguments, 8, renormalize=True)
    x, residual, *others = arguments
    alone = norm_and_route(x[4:5], residual[4:5], *others, 8, renormalize=True)
    assert all(torch.equal(one[0], every[4]) for one, every in zip(alone, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            results = norm_and_route(*arguments, 8, renormalize=True)
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


# --- anywhere


def test_without_an_entry_it_is_the_three_ops():
    arguments = make(5, 48, 12, torch.float32, "cpu")
    x, residual, gain, _, router = arguments
    y, total, weights, experts = norm_and_route(*arguments, 4, renormalize=True)
    expected_y, expected_total = rms_norm_ref(x, gain, EPS, residual_TH=residual)
    expected_weights, expected_experts = route_tokens_ref(linear_ref(expected_y, router), 4, renormalize=True)
    assert torch.equal(experts, expected_experts)
    for result, expected in ((y, expected_y), (total, expected_total), (weights, expected_weights)):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    separate = separate_norm_and_route(*arguments, 4, renormalize=True)
    assert all(torch.equal(one, other) for one, other in zip(separate, (y, total, weights, experts), strict=True))


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "num_experts", "top_k", "reason"),
    [
        (0, 2048, 128, 8, "1 to 128 tokens"),
        (129, 2048, 128, 8, "1 to 128 tokens"),
        (2, 1024, 128, 8, "a router of 128 experts x 1024"),
        (2, 2048, 96, 8, "a router of 96 experts"),
        (2, 4096, 256, 8, "up to 524288 numbers"),
        (2, 2048, 64, 33, "top_k 33"),
        (2, 2048, 128, 8, "compute capability 9.0"),
    ],
)
def test_what_does_not_fit_says_why(num_tokens, hidden, num_experts, top_k, reason):
    x, residual, gain, eps, router = make(num_tokens, hidden, num_experts, torch.bfloat16, "cpu")
    assert reason in unfit_reason(x, residual, gain, router, top_k)
    with pytest.raises(ValueError, match="norm_and_route: "):
        fused_norm_and_route(x, residual, gain, eps, router, top_k, renormalize=True)


def test_other_misfits_say_why_once(caplog):
    x, residual, gain, _, router = make(2, 2048, 128, torch.bfloat16, "cpu")
    loader.warn_unserved.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert "all must be bfloat16" in unfit_reason(x, residual.float(), gain, router, 8)
    assert len(caplog.records) == 1
    assert "do not fit" in unfit_reason(x, residual[:1], gain, router, 8)
    assert "multiples of 16 bytes" in unfit_reason(x, residual, gain, torch.zeros(128, 2049, dtype=x.dtype)[:, 1:], 8)


@pytest.mark.parametrize(("hidden", "num_experts", "tokens", "is_float16"), [(2048, 128, 8, 0), (4096, 64, 1, 1)])
def test_nvrtc_compiles_it(nvrtc, hidden, num_experts, tokens, is_float16):
    macros = {"HIDDEN": hidden, "EXPERTS": num_experts, "TOKENS": tokens, "FLOAT16": is_float16}
    code = (loader.SOURCE_DIR / f"{module.SOURCE}.cu").read_bytes()
    options = ["--gpu-architecture=sm_90a", "-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
    assert loader.compile_source(code, f"{module.SOURCE}.cu", options).startswith(b"\x7fELF")
