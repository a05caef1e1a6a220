import pytest
import torch
from pilotfish.kernels.store_kv import store_kv, store_kv_ref


def test_reference_writes_each_token_where_its_slot_says():
    k, v = torch.randn(2, 4, 2, 8)
    k_cache, v_cache = torch.zeros(2, 3, 16, 2, 8)
    store_kv_ref(k, v, k_cache, v_cache, torch.tensor([17, -1, 0, 47]))
    for token, (page, offset) in {0: (1, 1), 2: (0, 0), 3: (2, 15)}.items():
        assert torch.equal(k_cache[page, offset], k[token])
        assert torch.equal(v_cache[page, offset], v[token])
    assert (k_cache.flatten(0, 1).any((1, 2))).sum() == 3


def test_keys_and_values_of_different_widths_in_one_cache():
    k, v, cache = torch.randn(3, 2, 4), torch.randn(3, 2, 24), torch.zeros(2, 16, 2, 28)
    expected = cache.clone()
    slots = torch.tensor([20, -1, 3])
    store_kv(k, v, cache[..., 24:], cache[..., :24], slots)
    store_kv_ref(k, v, expected[..., 24:], expected[..., :24], slots)
    assert torch.equal(cache, expected)
    assert torch.equal(cache[1, 4], torch.cat([v[0], k[0]], dim=-1))
    assert cache.count_nonzero() == 2 * 2 * 28


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("v", torch.zeros(3, 2, 8)),
        ("v", torch.zeros(2, 2, 9)),
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
