"""The sum of experts' terms and the norm behind it, in one kernel: what the two kernels give, to the bit."""

import pytest
import torch
from pilotfish.kernels.expert_terms import ExpertTerms, sum_terms, sum_terms_and_norm
from pilotfish.kernels.rms_norm import _rms_norm_triton

EPS = 1e-6
# (tokens, choices, hidden)
SMALL = {"one": (1, 1, 64), "odd": (5, 3, 100), "blocks": (3, 2, 1500), "qwen3": (2, 8, 2048)}
LARGE = {
    "qwen3_decode": (128, 8, 2048),
    "qwen3_prefill": (5000, 8, 2048),
    "gpt_oss": (33, 4, 2880),
    "wide": (64, 8, 4096),
    "odd_wide": (200, 10, 5144),
    "many_choices": (50, 32, 8192),
}


def make(case, device, dtype):
    """The terms of negative experts are not written: they are NaN."""
    num_tokens, num_choices, hidden = case
    experts = torch.randint(0, 9, (num_tokens, num_choices), device=device, dtype=torch.int32)
    experts[torch.rand(num_tokens, num_choices, device=device) < 0.2] = -1
    experts[0] = 3
    y = torch.randn(num_tokens * num_choices, hidden, device=device).to(dtype)
    y[experts.flatten() < 0] = float("nan")
    residual, weight = torch.randn(num_tokens, hidden + 24, device=device), torch.randn(hidden, device=device)
    return ExpertTerms(y, experts), residual.to(dtype)[:, 16 : 16 + hidden], weight.to(dtype)


def test_the_sum_is_rounded_once_in_the_order_of_choices(device, dtype, case):
    terms, _, _ = make(case, device, dtype)
    expected = torch.zeros_like(sum_terms(terms), dtype=torch.float32)
    for y, expert in zip(terms.y_PH.view(*case).unbind(1), terms.experts_TC.unbind(1), strict=True):
        expected += torch.where(expert.unsqueeze(1) < 0, 0, y.float())
    assert torch.equal(sum_terms(terms), expected.to(dtype))
    assert sum_terms(expected) is expected


def test_one_kernel_equals_two(device, dtype, case):
    terms, residual, weight = make(case, device, dtype)
    results = sum_terms_and_norm(terms, residual, weight, EPS)
    expected = _rms_norm_triton(sum_terms(terms), weight, EPS, residual_TH=residual)
    for result, wanted in zip(results, expected, strict=True):
        assert result.isfinite().all()
        assert torch.equal(result, wanted)


def test_bfloat16_in_the_interpreter_too(device):
    """Of products alone it is wrong there."""
    test_one_kernel_equals_two(device, torch.bfloat16, SMALL["odd"])


def test_float32_weight_with_half_activations(device):
    terms, residual, weight = make(SMALL["odd"], device, torch.float16)
    expected = _rms_norm_triton(sum_terms(terms), weight.float(), EPS, residual_TH=residual)
    results = sum_terms_and_norm(terms, residual, weight.float(), EPS)
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    ("residual", "weight", "reason"),
    [
        (torch.zeros(3, 8), torch.zeros(8), "residual"),
        (torch.zeros(2, 8, dtype=torch.float16), torch.zeros(8), "residual"),
        (torch.zeros(8, 2).T, torch.zeros(8), "residual"),
        (torch.zeros(2, 8), torch.zeros(4), "weight"),
        (torch.zeros(2, 8), torch.zeros(16)[::2], "weight"),
    ],
)
def test_misfits_are_refused(residual, weight, reason):
    terms = ExpertTerms(torch.zeros(6, 8), torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"sum_terms_and_norm: {reason}"):
        sum_terms_and_norm(terms, residual, weight, EPS)
