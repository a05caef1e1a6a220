"""gated_linear on the CPU and on a GPU, by whichever kernel is chosen."""

import pytest
import torch
from pilotfish.kernels.gated_activation import gated_activation
from pilotfish.kernels.gated_linear import TOLERANCE, gated_linear, gated_linear_ref
from pilotfish.kernels.linear import linear


def make(rows, inputs, intermediate, dtype, device="cpu"):
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    weight = (torch.randn(2 * intermediate, inputs, device=device) / inputs**0.5).to(dtype)
    return x, weight, torch.randn(2 * intermediate, device=device, dtype=dtype)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_on_a_cpu_it_is_linear_then_gated_activation(activation, weight_dtype):
    x, weight, bias = make(5, 48, 30, weight_dtype)
    x = x.float()
    y = gated_linear(x, weight, bias, activation=activation)
    assert torch.equal(y, gated_activation(linear(x, weight, bias), activation))
    expected = gated_linear_ref(x, weight, bias, activation=activation)
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[torch.float32][0], atol=TOLERANCE[torch.float32][1])


def test_the_reference_rounds_before_the_activation():
    x, weight, bias = make(4, 64, 33, torch.bfloat16)
    gate, up = (x.double() @ weight.double().T + bias.double()).to(torch.bfloat16).double().chunk(2, dim=-1)
    expected = (gate / (1 + (-gate).exp()) * up).to(torch.bfloat16)
    torch.testing.assert_close(gated_linear_ref(x, weight, bias, activation="silu"), expected, rtol=1.6e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 8, 33, 64, 65, 300])
@pytest.mark.parametrize(("inputs", "intermediate"), [(1024, 3072), (4096, 12288), (100, 70)])
def test_on_a_gpu_the_chosen_kernel_equals_the_reference(rows, inputs, intermediate, dtype):
    x, weight, bias = make(rows, inputs, intermediate, dtype, device="cuda")
    y = gated_linear(x, weight, bias, activation="silu")
    expected = gated_linear_ref(x, weight, bias, activation="silu")
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][1])


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 3), None),
        (torch.zeros(3), torch.zeros(4, 3), None),
        (torch.zeros(2, 3), torch.zeros(4, 2), None),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2)),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias):
    with pytest.raises(ValueError, match="linear: "):
        gated_linear(x, weight, bias, activation="silu")


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="relu"):
        gated_linear(torch.zeros(2, 3), torch.zeros(4, 3), activation="relu")
