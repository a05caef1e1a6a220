import pytest
import torch
from pilotfish.kernels.rotary import apply_rotary, apply_rotary_ref
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def tables(num_positions, rotary_dims):
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dims, 2) / rotary_dims)
    angles = torch.arange(num_positions)[:, None] * frequencies
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_rotated_stays(dtype):
    qkv = torch.randn(4, 8, 24, dtype=dtype)
    before = qkv.clone()
    cos, sin = tables(16, 8)
    apply_rotary_ref(qkv[:, :4], qkv[:, 4:6], cos, sin, torch.tensor([1, 2, 3, 4]))
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
