import pytest
import torch
from pilotfish.kernels.head_linear import TOLERANCE, head_linear, head_linear_ref

# (tokens, heads, inputs, outputs)
SMALL = {"one": (1, 4, 12, 20), "some": (7, 3, 16, 5), "empty": (0, 2, 8, 8)}
LARGE = {"up": (3, 16, 128, 512), "down": (130, 128, 512, 128)}


@pytest.mark.parametrize("transposed", [False, True])
def test_equals_one_product_a_head(device, dtype, case, transposed):
    num_tokens, num_heads, inputs, outputs = case
    x = torch.randn(num_tokens, num_heads, inputs + 4, device=device).to(dtype)[..., :inputs]
    shape = (num_heads, inputs, outputs) if transposed else (num_heads, outputs, inputs)
    weight = (torch.randn(shape, device=device) / inputs**0.5).to(dtype)
    weight = weight.transpose(1, 2) if transposed else weight
    exact = torch.einsum("tnk,nmk->tnm", x.double(), weight.double())
    rtol, atol = TOLERANCE[dtype]
    for y in (head_linear(x, weight), head_linear_ref(x, weight)):
        assert y.shape == exact.shape
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=atol)


def test_bfloat16_weights_on_a_cpu():
    x, weight = torch.randn(3, 2, 8), torch.randn(2, 5, 8).bfloat16()
    torch.testing.assert_close(head_linear(x, weight), head_linear(x, weight.float()))


@pytest.mark.parametrize("weight", [torch.zeros(2, 5, 7), torch.zeros(3, 5, 8), torch.zeros(5, 8)])
def test_misfits_are_refused(weight):
    with pytest.raises(ValueError, match="head_linear"):
        head_linear(torch.zeros(3, 2, 8), weight)
