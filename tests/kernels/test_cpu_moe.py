"""The C++ routing and experts against their references, and against a dense layer bit for bit."""

import pytest
import torch
from pilotfish.kernels.cpu import ops as cpu_ops
from pilotfish.kernels.gated_activation import gated_activation
from pilotfish.kernels.linear import linear
from pilotfish.kernels.moe_mlp import TOLERANCE, moe_mlp, moe_mlp_ref
from pilotfish.kernels.moe_routing import TOLERANCE as ROUTING_TOLERANCE
from pilotfish.kernels.moe_routing import route_tokens, route_tokens_ref

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 1, 1), (9, 8, 2), (300, 60, 8), (5, 6, 6)])
def test_routing(num_tokens, num_experts, top_k, renormalize):
    logits = torch.randn(num_tokens, num_experts + 1)[:, :num_experts] * 3
    assert cpu_ops.supports("route_tokens", logits.dtype)
    weights, experts = route_tokens(logits, top_k, renormalize=renormalize)
    expected_weights, expected_experts = route_tokens_ref(logits, top_k, renormalize=renormalize)
    assert torch.equal(experts, expected_experts)
    relative, absolute = ROUTING_TOLERANCE
    torch.testing.assert_close(weights, expected_weights, rtol=relative, atol=absolute)


def test_of_equal_logits_the_lowest_expert_comes_first():
    _, experts = route_tokens(torch.tensor([[0.0, 2.0, 2.0, 0.0, 2.0]]), 4, renormalize=True)
    assert experts.tolist() == [[1, 2, 4, 0]]


def make(num_tokens, num_experts, top_k, hidden, intermediate, dtype):
    x = torch.randn(num_tokens, hidden)
    gate_up = (torch.randn(num_experts, 2 * intermediate, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(num_experts, hidden, intermediate) / intermediate**0.5).to(dtype)
    weights, experts = route_tokens(torch.randn(num_tokens, num_experts), top_k, renormalize=True)
    return x, gate_up, down, weights, experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "hidden", "intermediate"),
    [(0, 4, 2, 16, 8), (1, 4, 2, 16, 8), (7, 4, 2, 20, 13), (40, 8, 3, 64, 48), (3, 64, 8, 32, 16), (100, 2, 2, 33, 70)],
)
def test_experts(num_tokens, num_experts, top_k, hidden, intermediate, activation, dtype):
    arguments = make(num_tokens, num_experts, top_k, hidden, intermediate, dtype)
    assert cpu_ops.supports("moe_mlp", torch.float32, dtype, dtype)
    relative, absolute = TOLERANCE[torch.float32]
    expected = moe_mlp_ref(*arguments, activation)
    torch.testing.assert_close(moe_mlp(*arguments, activation), expected, rtol=relative, atol=absolute)


def test_experts_elsewhere_contribute_nothing():
    x, gate_up, down, weights, experts = make(10, 4, 2, 16, 8, torch.bfloat16)
    experts[3], experts[5, 1] = -1, -1
    y = moe_mlp(x, gate_up, down, weights, experts, "silu")
    torch.testing.assert_close(y, moe_mlp_ref(x, gate_up, down, weights, experts, "silu"), rtol=1e-4, atol=1e-5)
    assert not y[3].any()
    assert not moe_mlp(x, gate_up, down, weights, torch.full_like(experts, -1), "silu").any()


def test_one_expert_is_the_dense_layer_bit_for_bit():
    x, gate_up, down, _, _ = make(33, 3, 1, 48, 40, torch.bfloat16)
    experts = torch.randint(0, 3, (33, 1), dtype=torch.int32)
    y = moe_mlp(x, gate_up[1:2].expand(3, -1, -1), down[1:2].expand(3, -1, -1), torch.ones(33, 1), experts, "silu")
    assert torch.equal(y, linear(gated_activation(linear(x, gate_up[1]), "silu"), down[1]))


def test_a_token_has_the_same_bits_alone_and_in_a_batch():
    x, gate_up, down, weights, experts = make(50, 8, 2, 64, 48, torch.bfloat16)
    together = moe_mlp(x, gate_up, down, weights, experts, "silu")
    for token in (0, 21, 49):
        row = slice(token, token + 1)
        assert torch.equal(moe_mlp(x[row], gate_up, down, weights[row], experts[row], "silu")[0], together[token])


def test_slices_of_larger_weights():
    x, gate_up, down, weights, experts = make(12, 6, 2, 24, 20, torch.float32)
    wide = torch.randn(12, 30)
    wide[:, 3:27] = x
    big = torch.zeros(6, 50, 30)
    big[:, 5:45, 6:] = gate_up
    y = moe_mlp(wide[:, 3:27], big[:, 5:45, 6:], down, weights, experts, "silu")
    torch.testing.assert_close(y, moe_mlp_ref(x, gate_up, down, weights, experts, "silu"), rtol=1e-4, atol=1e-5)
