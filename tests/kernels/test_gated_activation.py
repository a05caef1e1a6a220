import math

import pytest
import torch
from pilotfish.kernels.gated_activation import (
    ACTIVATIONS,
    TOLERANCE,
    _gated_activation_triton,
    gated_activation,
    gated_activation_ref,
)

# (tokens, intermediate)
SMALL = {"one": (1, 64), "odd": (3, 100), "empty": (0, 64), "two_blocks": (2, 1030)}
LARGE = {"prefill": (2000, 14336), "long": (70000, 16)}
# numpy, under the interpreter, warns where exp(-gate) overflows to the infinity that the sigmoid needs.
pytestmark = pytest.mark.filterwarnings("ignore:overflow")
RUN = {"cpu": _gated_activation_triton, "cuda": gated_activation}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_equals_the_formula_in_float64(activation):
    gate_up = torch.randn(5, 40) * 4
    gate, up = gate_up.double().chunk(2, -1)
    if activation == "silu":
        expected = gate / (1 + (-gate).exp()) * up
    else:
        expected = gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    torch.testing.assert_close(gated_activation_ref(gate_up, activation).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_equals_reference(device, dtype, case, activation):
    num_tokens, intermediate = case
    wide = torch.randn(num_tokens, 2 * intermediate + 16, device=device, dtype=dtype) * 4
    rtol, atol = TOLERANCE[dtype]
    for gate_up in (wide[:, :-16], wide[:, :-16].contiguous()):
        y = RUN[device](gate_up, activation)
        assert y.shape == (num_tokens, intermediate)
        torch.testing.assert_close(y, gated_activation_ref(gate_up, activation), rtol=rtol, atol=atol)


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="silu, gelu_tanh"):
        gated_activation(torch.zeros(2, 4), "relu")
    with pytest.raises(ValueError, match="gated_activation"):
        gated_activation(torch.zeros(2, 5), "silu")
    with pytest.raises(ValueError, match="contiguous"):
        gated_activation(torch.zeros(4, 2).T, "silu")
