import pytest
import torch
from pilotfish.kernels.rms_norm import TOLERANCE, _rms_norm_triton, rms_norm, rms_norm_ref
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# (leading shape, hidden)
SMALL = {"one": ((1,), 64), "empty": ((0,), 64), "odd": ((5,), 100), "heads": ((3, 4), 24)}
LARGE = {"wide": ((300,), 8192), "odd_wide": ((64,), 5120 + 24), "many_heads": ((1000, 32), 128)}
RUN = {"cpu": _rms_norm_triton, "cuda": rms_norm}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_equals_transformers(dtype):
    x, residual = torch.randn(2, 7, 96, dtype=dtype) * 3
    theirs = LlamaRMSNorm(96, eps=0.5).to(dtype)
    theirs.weight.data = torch.randn(96).to(dtype)
    y, new_residual = rms_norm_ref(x, theirs.weight.data, 0.5, residual_TH=residual)
    torch.testing.assert_close(new_residual, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, theirs(x + residual), rtol=1e-6, atol=1e-6)


def test_kernel_equals_reference(device, dtype, case):
    leading, hidden = case
    x = torch.randn(*leading, hidden, device=device, dtype=dtype) * 2
    weight = torch.randn(hidden, device=device, dtype=dtype)
    rtol, atol = TOLERANCE[dtype]
    for eps in (1e-6, 0.5):
        torch.testing.assert_close(RUN[device](x, weight, eps), rms_norm_ref(x, weight, eps), rtol=rtol, atol=atol)


def test_kernel_rounds_before_the_weight_too(device):
    """Most halves equal the reference's bit by bit; with one rounding a quarter of them would differ."""
    x = torch.randn(20, 500, device=device).half()
    weight = torch.randn(500, device=device).half()
    assert (RUN[device](x, weight, 1e-6) != rms_norm_ref(x, weight, 1e-6)).float().mean() < 0.02


def test_kernel_with_residual(device, dtype, case):
    leading, hidden = case
    rows = torch.Size(leading).numel()
    x, residual = torch.randn(2, rows, hidden, device=device, dtype=dtype)
    weight = torch.randn(hidden, device=device, dtype=dtype)
    before = residual.clone()
    y, new_residual = RUN[device](x, weight, 1e-6, residual_TH=residual)
    expected_y, expected_residual = rms_norm_ref(x, weight, 1e-6, residual_TH=residual)
    assert torch.equal(new_residual, expected_residual)
    assert torch.equal(residual, before)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(y, expected_y, rtol=rtol, atol=atol)


def test_an_addend_is_added_and_rounded_before_the_residual(device, dtype):
    x, addend, residual = torch.randn(3, 7, 96, device=device, dtype=dtype)
    weight = torch.randn(96, device=device, dtype=dtype)
    for run in (RUN[device], rms_norm, rms_norm_ref):
        y, new_residual = run(x, weight, 1e-6, residual_TH=residual, addend_TH=addend)
        expected_y, expected_residual = run(x + addend, weight, 1e-6, residual_TH=residual)
        assert torch.equal(new_residual, expected_residual)
        assert torch.equal(y, expected_y)
        assert torch.equal(new_residual, x + addend + residual)


def test_kernel_reads_views(device, dtype):
    """The heads of a packed qkv, and rows of a wider matrix, without a copy."""
    weight = torch.randn(16, device=device, dtype=dtype)
    rtol, atol = TOLERANCE[dtype]
    heads = torch.randn(3, 9, 20, device=device, dtype=dtype)[:, 2:6, :16]
    wide = torch.randn(5, 40, device=device, dtype=dtype)
    for x in (heads, wide[:, 16:32], wide[::2, :16]):
        y = RUN[device](x, weight, 1e-6)
        assert y.is_contiguous()
        torch.testing.assert_close(y, rms_norm_ref(x, weight, 1e-6), rtol=rtol, atol=atol)
    y, new_residual = RUN[device](wide[:, :16], weight, 1e-6, residual_TH=wide[:, 24:])
    torch.testing.assert_close(new_residual, wide[:, :16] + wide[:, 24:], rtol=0, atol=0)
    torch.testing.assert_close(y, rms_norm_ref(new_residual, weight, 1e-6), rtol=rtol, atol=atol)


def test_float32_weight_with_half_activations(device):
    x = torch.randn(3, 64, device=device, dtype=torch.float16)
    weight = torch.randn(64, device=device)
    rtol, atol = TOLERANCE[torch.float16]
    y = RUN[device](x, weight, 1e-6)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, rms_norm_ref(x, weight, 1e-6), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("x", "weight", "residual"),
    [
        (torch.zeros(2, 8), torch.zeros(4), None),
        (torch.zeros(2, 8), torch.zeros(8), torch.zeros(3, 8)),
        (torch.zeros(2, 8), torch.zeros(8), torch.zeros(2, 8, dtype=torch.float16)),
        (torch.zeros(2, 3, 8), torch.zeros(8), torch.zeros(2, 3, 8)),
        (torch.zeros(8, 2).T, torch.zeros(8), None),
    ],
)
def test_misfits_are_refused(x, weight, residual):
    with pytest.raises(ValueError, match="rms_norm"):
        rms_norm(x, weight, 1e-6, residual_TH=residual)


def test_addends_that_do_not_fit_are_refused():
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(ValueError, match="an addend needs a residual"):
        rms_norm(x, weight, 1e-6, addend_TH=x)
    for addend in (x[:1], x.half(), torch.zeros(8, 2).T):
        with pytest.raises(ValueError, match="addend"):
            rms_norm(x, weight, 1e-6, residual_TH=x, addend_TH=addend)
