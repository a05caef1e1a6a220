import pytest
import torch
from pilotfish.kernels.store_kv import _store_kv_triton, store_kv, store_kv_ref

# (tokens, kv heads, head_dim, blocks, page length)
SMALL = {"plain": (7, 2, 16, 3, 16), "empty": (0, 2, 16, 3, 16), "odd": (5, 3, 20, 4, 32), "two_rounds": (2, 5, 256, 2, 16)}
LARGE = {"prefill": (4000, 8, 128, 300, 16), "long_pages": (500, 4, 192, 10, 128)}
RUN = {"cpu": _store_kv_triton, "cuda": store_kv}


def test_reference_writes_each_token_where_its_slot_says():
    k, v = torch.randn(2, 4, 2, 8)
    k_cache, v_cache = torch.zeros(2, 3, 16, 2, 8)
    store_kv_ref(k, v, k_cache, v_cache, torch.tensor([17, -1, 0, 47]))
    for token, (page, offset) in {0: (1, 1), 2: (0, 0), 3: (2, 15)}.items():
        assert torch.equal(k_cache[page, offset], k[token])
        assert torch.equal(v_cache[page, offset], v[token])
    assert (k_cache.flatten(0, 1).any((1, 2))).sum() == 3


@pytest.mark.parametrize("cache_dtype", [None, torch.float16])
def test_kernel_equals_reference(device, dtype, case, cache_dtype):
    """From a packed qkv into two views of one cache; padding leaves everything else as it was."""
    num_tokens, num_heads, head_dim, num_blocks, page_len = case
    qkv = torch.randn(num_tokens, 4 * num_heads, head_dim, device=device, dtype=dtype)
    k, v = qkv[:, 2 * num_heads : 3 * num_heads], qkv[:, 3 * num_heads :]
    shape = (num_blocks, 2, page_len, num_heads, head_dim + 4)
    wide_cache = torch.randn(shape, device=device).to(cache_dtype or dtype)
    wide_expected = wide_cache.clone()
    cache, expected = wide_cache[..., :head_dim], wide_expected[..., :head_dim]
    slots = torch.randperm(num_blocks * page_len, device=device)[:num_tokens]
    slots[1::3] = -1
    RUN[device](k, v, cache[:, 0], cache[:, 1], slots)
    store_kv_ref(k, v, expected[:, 0], expected[:, 1], slots)
    assert torch.equal(wide_cache, wide_expected)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("v", torch.zeros(3, 2, 8)),
        ("v", torch.zeros(2, 2, 8, dtype=torch.float16)),
        ("v_cache", torch.zeros(3, 32, 2, 8)),
        ("slots", torch.zeros(2, dtype=torch.int32)),
        ("slots", torch.zeros(3, dtype=torch.int64)),
        ("k", torch.zeros(2, 8, 2).transpose(1, 2)),
    ],
)
def test_misfits_are_refused(change, value):
    arguments = {
        "k": torch.zeros(2, 2, 8),
        "v": torch.zeros(2, 2, 8),
        "k_cache": torch.zeros(3, 16, 2, 8),
        "v_cache": torch.zeros(3, 16, 2, 8),
        "slots": torch.tensor([0, 1]),
    }
    store_kv(*arguments.values())
    with pytest.raises(ValueError, match="store_kv"):
        store_kv(*(arguments | {change: value}).values())
