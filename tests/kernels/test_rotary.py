import pytest
import torch
from pilotfish.kernels.rotary import TOLERANCE, _apply_rotary_triton, apply_rotary, apply_rotary_ref
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

# (tokens, query heads, kv heads, head_dim, rotary dims)
SMALL = {"plain": (5, 4, 2, 32, 32), "partial": (3, 9, 3, 24, 16), "empty": (0, 4, 2, 32, 32), "padded": (2, 3, 1, 20, 12)}
LARGE = {"prefill": (1000, 32, 8, 128, 128), "wide": (33, 16, 2, 256, 64)}
RUN = {"cpu": _apply_rotary_triton, "cuda": apply_rotary}


def tables(num_positions, rotary_dims, device="cpu"):
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dims, 2, device=device) / rotary_dims)
    angles = torch.arange(num_positions, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def test_reference_equals_transformers():
    q, k = torch.randn(6, 4, 32), torch.randn(6, 2, 32)
    positions = torch.tensor([0, 3, 3, 17, 1, 40])
    cos, sin = tables(41, 32)
    full_cos, full_sin = (torch.cat([t, t], -1)[positions][None] for t in (cos, sin))
    expected_q, expected_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], full_cos, full_sin)
    apply_rotary_ref(q, k, cos, sin, positions)
    torch.testing.assert_close(q, expected_q[0].transpose(0, 1))
    torch.testing.assert_close(k, expected_k[0].transpose(0, 1))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_kernel_equals_reference_on_packed_qkv(device, dtype, case, index_dtype):
    num_tokens, num_heads, num_kv_heads, head_dim, rotary_dims = case
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device, dtype=dtype)
    expected = qkv.clone()
    cos, sin = tables(64, rotary_dims, device)
    positions = torch.randint(0, 64, (num_tokens,), device=device, dtype=index_dtype)
    for run, packed in ((RUN[device], qkv), (apply_rotary_ref, expected)):
        run(packed[:, :num_heads], packed[:, num_heads : num_heads + num_kv_heads], cos, sin, positions)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(qkv, expected, rtol=rtol, atol=atol)


def test_what_is_not_rotated_stays(device, dtype):
    qkv = torch.randn(4, 8, 24, device=device, dtype=dtype)
    before = qkv.clone()
    cos, sin = tables(16, 8, device)
    RUN[device](qkv[:, :4], qkv[:, 4:6], cos, sin, torch.tensor([1, 2, 3, 4], device=device))
    assert torch.equal(qkv[:, 6:], before[:, 6:])
    assert torch.equal(qkv[..., 8:], before[..., 8:])
    assert not torch.equal(qkv[:, :6, :8], before[:, :6, :8])


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("k", torch.zeros(3, 2, 16)),
        ("k", torch.zeros(2, 2, 16, dtype=torch.float16)),
        ("cos", torch.zeros(8, 9)),
        ("cos", torch.zeros(8, 8, dtype=torch.float16)),
        ("positions", torch.zeros(3, dtype=torch.int64)),
        ("positions", torch.zeros(2)),
        ("q", torch.zeros(16, 4, 2).transpose(0, 2)),
    ],
)
def test_misfits_are_refused(change, value):
    arguments = {
        "q": torch.zeros(2, 4, 16),
        "k": torch.zeros(2, 2, 16),
        "cos": torch.zeros(8, 8),
        "sin": torch.zeros(8, 8),
        "positions": torch.zeros(2, dtype=torch.int64),
    }
    apply_rotary(*arguments.values())
    with pytest.raises(ValueError, match="apply_rotary"):
        apply_rotary(*(arguments | {change: value}).values())
