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
