"""The C++ twins of norm, rotary, gated activation and KV store against their references."""

import pytest
import torch
import torch.nn.functional as F
from pilotfish.kernels import gated_activation as activation_file
from pilotfish.kernels import rms_norm as norm_file
from pilotfish.kernels.cpu import ops as cpu_ops
from pilotfish.kernels.gated_activation import gated_activation, gated_activation_ref
from pilotfish.kernels.rms_norm import rms_norm, rms_norm_ref
from pilotfish.kernels.rotary import apply_rotary, apply_rotary_ref
from pilotfish.kernels.store_kv import store_kv, store_kv_ref

pytestmark = pytest.mark.usefixtures("two_threads")

WEIGHT_DTYPES = [torch.float32, torch.bfloat16]


def assert_close(actual, expected, tolerance):
    relative, absolute = tolerance[torch.float32]
    torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(0, 8), (1, 1), (1, 7), (3, 16), (5, 100), (200, 576)])
def test_rms_norm(rows, hidden, weight_dtype):
    x, residual = torch.randn(2, rows, hidden) * 3
    weight = torch.randn(hidden).to(weight_dtype)
    assert cpu_ops.supports("rms_norm", x.dtype, weight.dtype)
    assert_close(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6), norm_file.TOLERANCE)
    before = x.clone(), residual.clone()
    y, new_residual = rms_norm(x, weight, 1e-6, residual_TH=residual)
    expected_y, expected_residual = rms_norm_ref(x, weight, 1e-6, residual_TH=residual)
    assert torch.equal(new_residual, expected_residual)
    assert_close(y, expected_y, norm_file.TOLERANCE)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_rms_norm_of_small_numbers_is_held_up_by_eps():
    x, weight = torch.randn(3, 40) * 1e-3, torch.randn(40)
    assert_close(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5), norm_file.TOLERANCE)
    assert not rms_norm(torch.zeros(2, 40), weight, 1e-5).any()


def test_rms_norm_of_views():
    weight = torch.randn(24)
    packed = torch.randn(7, 9, 24)
    for x in (packed[:, 2:6], packed[0, 0], packed[:, 3], packed[None, :, :2], packed[::2, 1:3]):
        assert_close(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5), norm_file.TOLERANCE)
    wide = torch.randn(6, 80)
    y, new_residual = rms_norm(wide[:, :24], weight, 1e-5, residual_TH=wide[:, 40:64])
    assert torch.equal(new_residual, wide[:, :24] + wide[:, 40:64])
    assert_close(y, rms_norm_ref(new_residual, weight, 1e-5), norm_file.TOLERANCE)


def test_rms_norm_of_a_row_has_the_same_bits_in_a_batch():
    x, weight = torch.randn(300, 577), torch.randn(577)
    assert torch.equal(rms_norm(x, weight, 1e-6)[123], rms_norm(x[123], weight, 1e-6))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("head_dim", "rotary_dims"), [(64, 64), (24, 16), (80, 40), (20, 6), (8, 0)])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 200])
def test_rotary(num_tokens, head_dim, rotary_dims, index_dtype):
    qkv = torch.randn(num_tokens, 9, head_dim)
    expected = qkv.clone()
    cos, sin = torch.randn(2, 64, rotary_dims // 2)
    positions = torch.randint(0, 64, (num_tokens,), dtype=index_dtype)
    assert cpu_ops.supports("apply_rotary", qkv.dtype, cos.dtype)
    apply_rotary(qkv[:, :4], qkv[:, 5:7], cos, sin, positions)
    apply_rotary_ref(expected[:, :4], expected[:, 5:7], cos, sin, positions)
    assert torch.equal(qkv[:, 7:], expected[:, 7:])
    assert torch.equal(qkv[..., rotary_dims:], expected[..., rotary_dims:])
    torch.testing.assert_close(qkv, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", activation_file.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "size"), [(0, 4), (1, 1), (2, 13), (1, 1536), (40, 500)])
def test_gated_activation(rows, size, activation):
    gate_up = torch.randn(rows, 2 * size + 3)[:, : 2 * size] * 4
    assert cpu_ops.supports("gated_activation", gate_up.dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    assert_close(gated_activation(gate_up, activation).double(), exact, activation_file.TOLERANCE)
    reference = gated_activation_ref(gate_up, activation).double()  # cancels in 1 + tanh(x) for negative x
    torch.testing.assert_close(reference, exact, rtol=1e-5, atol=1e-5)


def test_silu_is_accurate_where_exp_is_large_or_small():
    gate = torch.linspace(-86, 100, 40_001)
    y = gated_activation(torch.cat([gate, torch.ones_like(gate)])[None], "silu")[0]
    wide = gate.double()
    torch.testing.assert_close(y.double(), wide / (1 + (-wide).exp()), rtol=1e-6, atol=0)


def test_activations_of_infinite_and_missing_numbers():
    gate = torch.tensor([float("inf"), -float("inf"), float("nan"), -1e30, 1e30, -0.0])
    gate_up = torch.cat([gate, torch.ones(6)])[None]
    for activation in activation_file.ACTIVATIONS:
        y, expected = (f(gate_up, activation)[0] for f in (gated_activation, gated_activation_ref))
        torch.testing.assert_close(y[[0, 2, 3, 4, 5]], expected[[0, 2, 3, 4, 5]], equal_nan=True)


@pytest.mark.parametrize(("heads", "head_dim", "page_len"), [(3, 64, 16), (1, 5, 16), (2, 80, 128)])
def test_store_kv(heads, head_dim, page_len):
    k_cache, v_cache = torch.zeros(2, 6, page_len, heads, head_dim)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    slots = torch.randperm(6 * page_len)[:40]
    slots[[3, 17]] = -1
    qkv = torch.randn(40, 3 * heads, head_dim)
    k, v = qkv[:, heads : 2 * heads], qkv[:, 2 * heads :]
    assert cpu_ops.supports("store_kv", k.dtype, k_cache.dtype)
    store_kv(k, v, k_cache, v_cache, slots)
    store_kv_ref(k, v, expected_k, expected_v, slots)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


def test_store_kv_into_one_cache_of_keys_and_values():
    cache = torch.zeros(5, 2, 16, 2, 8)
    k, v = torch.randn(2, 3, 2, 8)
    store_kv(k, v, cache[:, 0], cache[:, 1], torch.tensor([79, -1, 0]))
    assert torch.equal(cache[4, 0, 15], k[0])
    assert torch.equal(cache[0, 1, 0], v[2])
    assert cache.count_nonzero() == 2 * 2 * 16
