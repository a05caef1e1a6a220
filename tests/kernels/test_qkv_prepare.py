import pytest
import torch
from pilotfish.kernels.qkv_prepare import TOLERANCE, _prepare_qkv_triton, prepare_qkv, prepare_qkv_ref
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

# (tokens, query heads, kv heads, head_dim, rotary dims, page length)
SMALL = {
    "plain": (5, 4, 2, 32, 32, 16),
    "partial": (3, 9, 3, 24, 16, 32),
    "odd": (4, 3, 1, 20, 12, 16),
    "odd_blocks": (3, 17, 10, 12, 12, 16),
    "no_rotary": (2, 2, 2, 16, 0, 16),
    "empty": (0, 4, 2, 32, 32, 16),
}
LARGE = {
    "decode_8b": (1, 32, 8, 128, 128, 16),
    "decode_0.6b": (128, 16, 8, 128, 128, 64),
    "prefill": (2000, 32, 8, 128, 128, 16),
    "wide": (33, 16, 2, 256, 64, 128),
    "multi_query": (77, 71, 1, 64, 64, 16),
    "odd_head": (40, 12, 4, 80, 80, 16),
}
RUN = {"cpu": _prepare_qkv_triton, "cuda": prepare_qkv}
NUM_POSITIONS = 64


def tables(rotary_dims, device="cpu"):
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dims, 2, device=device) / max(rotary_dims, 1))
    angles = torch.arange(NUM_POSITIONS, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def inputs(case, device, dtype, *, cache_dtype=None, index_dtype=torch.int64):
    """A packed qkv, and (arguments of the op, its wide cache): two views of one cache that has columns behind the heads."""
    num_tokens, num_heads, num_kv_heads, head_dim, rotary_dims, page_len = case
    num_blocks = num_tokens // page_len + 3
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    cache = torch.randn(num_blocks, 2, page_len, num_kv_heads, head_dim + 8, device=device).to(cache_dtype or dtype)
    positions = torch.randint(0, NUM_POSITIONS, (num_tokens,), device=device, dtype=index_dtype)
    positions[:1], positions[1:2] = 0, NUM_POSITIONS - 1
    slots = torch.randperm(num_blocks * page_len, device=device)[:num_tokens]
    slots[2::3] = -1
    cos, sin = tables(rotary_dims, device)

    def arguments(qkv, cache):
        q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        k_cache, v_cache = cache[..., :head_dim].unbind(1)
        return q, k, v, cos, sin, positions, k_cache, v_cache, slots

    return qkv, cache, arguments


def norms(head_dim, device, dtype):
    q_norm, k_norm = (1 + torch.randn(2, head_dim, device=device)).to(dtype)
    return {"q_norm_D": q_norm, "k_norm_D": k_norm}


@pytest.mark.parametrize("has_norm", [False, True])
def test_kernel_equals_reference_on_packed_qkv(device, dtype, case, has_norm):
    num_heads, head_dim = case[1], case[3]
    qkv, cache, arguments = inputs(case, device, dtype)
    expected_qkv, expected_cache = qkv.clone(), cache.clone()
    options = {"norm_eps": 0.1} | (norms(head_dim, device, dtype) if has_norm else {})
    RUN[device](*arguments(qkv, cache), **options)
    prepare_qkv_ref(*arguments(expected_qkv, expected_cache), **options)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(qkv[:, :num_heads], expected_qkv[:, :num_heads], rtol=rtol, atol=atol)
    torch.testing.assert_close(cache, expected_cache, rtol=rtol, atol=atol)
    # Same roundings: where the last bit of a float32 sum does not tip one of them, the bits are the same.
    if dtype != torch.float32 and qkv.numel():
        assert (qkv[:, :num_heads] != expected_qkv[:, :num_heads]).float().mean() < 0.02
        assert (cache != expected_cache).float().mean() < 0.02


@pytest.mark.parametrize(("num_heads", "rotary_dims", "value_dim"), [(4, 16, 40), (9, 8, 24), (16, 64, 512)])
def test_keys_and_values_are_columns_of_one_cache(device, dtype, num_heads, rotary_dims, value_dim):
    """As latent attention keeps them: the key's numbers behind the value's, and wider queries of which only the end turns."""
    width, slots = value_dim + rotary_dims, torch.tensor([17, -1, 0], device=device)
    q = torch.randn(3, num_heads, width, device=device).to(dtype)
    row = torch.randn(3, 5 + width, device=device).to(dtype)[:, 5:].unsqueeze(1)
    cache = torch.randn(2, 16, 1, width, device=device).to(dtype)
    positions = torch.tensor([0, NUM_POSITIONS - 1, 5], device=device)

    def run(op, q, row, cache):
        q, row, cache = q.clone(), row.clone(), cache.clone()
        keys, values = (x[..., value_dim:] for x in (q, row, cache)), (x[..., :value_dim] for x in (row, cache))
        (q_turned, k, k_cache), (v, v_cache) = keys, values
        op(q_turned, k, v, *tables(rotary_dims, device), positions, k_cache, v_cache, slots, norm_eps=0.0)
        return q, cache

    (got_q, got_cache), (expected_q, expected_cache) = (run(op, q, row, cache) for op in (RUN[device], prepare_qkv_ref))
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(got_q, expected_q, rtol=rtol, atol=atol)
    torch.testing.assert_close(got_cache, expected_cache, rtol=rtol, atol=atol)
    assert torch.equal(got_q[..., :value_dim], q[..., :value_dim])
    assert torch.equal(got_cache[1, 1, 0, :value_dim], row[0, 0, :value_dim])


def test_nothing_else_is_written(device, dtype):
    """v, heads behind the last, columns behind the head and slots of no token keep their bits; padding stores nothing."""
    case = (6, 5, 3, 24, 16, 16)
    qkv, cache, arguments = inputs(case, device, dtype)
    before_qkv, before_cache = qkv.clone(), cache.clone()
    tensors = arguments(qkv, cache)
    RUN[device](*tensors, norm_eps=0.0)
    slots = tensors[-1]
    stored = torch.zeros(cache.shape[0] * 16, dtype=torch.bool, device=device)
    stored[slots[slots >= 0]] = True
    assert 0 < stored.sum() < 6
    for index in range(2):
        now, before = (c[:, index].flatten(0, 1) for c in (cache, before_cache))
        assert torch.equal(now[~stored], before[~stored])
        assert torch.equal(now[..., 24:], before[..., 24:])
        assert (now[stored][..., :24] != before[stored][..., :24]).any(-1).all()
    assert torch.equal(qkv[:, 8:], before_qkv[:, 8:])
    assert torch.equal(qkv[:, :5, 16:], before_qkv[:, :5, 16:])


def test_padding_of_a_captured_batch_stores_nothing(device, dtype):
    qkv, cache, arguments = inputs((4, 4, 2, 32, 32, 16), device, dtype)
    before = cache.clone()
    *tensors, slots = arguments(qkv, cache)
    tensors[5].zero_()
    RUN[device](*tensors, slots.fill_(-1), norm_eps=1e-6, **norms(32, device, dtype))
    assert torch.equal(cache, before)
    assert qkv.isfinite().all()


@pytest.mark.gpu
def test_a_captured_call_follows_its_inputs():
    qkv, cache, arguments = inputs(LARGE["decode_0.6b"], "cuda", torch.bfloat16)
    tensors, options = arguments(qkv, cache), norms(128, "cuda", torch.bfloat16) | {"norm_eps": 1e-6}
    prepare_qkv(*tensors, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepare_qkv(*tensors, **options)
    for index in (5, 8):  # other positions and slots
        qkv.normal_()
        tensors[index].copy_(tensors[index].roll(1))
        expected_qkv, expected_cache = qkv.clone(), cache.clone()
        prepare_qkv(*arguments(expected_qkv, expected_cache), **options)
        graph.replay()
        assert torch.equal(qkv[:, :16], expected_qkv[:, :16])
        assert torch.equal(cache, expected_cache)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_narrower_cache_and_a_wider_norm(device, index_dtype):
    qkv, cache, arguments = inputs(SMALL["plain"], device, torch.float32, cache_dtype=torch.float16, index_dtype=index_dtype)
    expected_qkv, expected_cache = qkv.clone(), cache.clone()
    options = norms(32, device, torch.float16) | {"norm_eps": 1e-6}
    RUN[device](*arguments(qkv, cache), **options)
    prepare_qkv_ref(*arguments(expected_qkv, expected_cache), **options)
    torch.testing.assert_close(qkv[:, :4], expected_qkv[:, :4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache, expected_cache, rtol=2e-3, atol=2e-3)


def test_a_token_has_the_same_bits_in_every_batch(device, dtype):
    qkv, cache, arguments = inputs((9, 4, 2, 32, 24, 16), device, dtype)
    alone_qkv, alone_cache = qkv.clone(), cache.clone()
    options = norms(32, device, dtype) | {"norm_eps": 1e-6}
    RUN[device](*arguments(qkv, cache), **options)
    q, k, v, cos, sin, positions, k_cache, v_cache, slots = arguments(alone_qkv, alone_cache)
    for t in range(9):
        row = slice(t, t + 1)
        RUN[device](q[row], k[row], v[row], cos, sin, positions[row], k_cache, v_cache, slots[row], **options)
    assert torch.equal(q, qkv[:, :4])
    assert torch.equal(alone_cache, cache)


@pytest.mark.parametrize("has_norm", [False, True])
def test_reference_equals_transformers(has_norm):
    qkv, cache, arguments = inputs((6, 4, 2, 32, 32, 16), "cpu", torch.float32)
    q, k, v, cos, sin, positions, k_cache, v_cache, slots = arguments(qkv, cache)
    weights, options = norms(32, "cpu", torch.float32), {"norm_eps": 1e-6}
    expected_q, expected_k, expected_v = q.clone(), k.clone(), v.clone()
    if has_norm:
        options |= weights
        theirs = Qwen3RMSNorm(32, eps=1e-6)
        theirs.weight.data = weights["q_norm_D"]
        expected_q = theirs(expected_q)
        theirs.weight.data = weights["k_norm_D"]
        expected_k = theirs(expected_k)
    full_cos, full_sin = (torch.cat([t, t], -1)[positions][None] for t in (cos, sin))
    turned = apply_rotary_pos_emb(expected_q.transpose(0, 1)[None], expected_k.transpose(0, 1)[None], full_cos, full_sin)
    expected_q, expected_k = (x[0].transpose(0, 1) for x in turned)
    prepare_qkv_ref(q, k, v, cos, sin, positions, k_cache, v_cache, slots, **options)
    torch.testing.assert_close(q, expected_q)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            torch.testing.assert_close(k_cache[slot // 16, slot % 16], expected_k[token])
            assert torch.equal(v_cache[slot // 16, slot % 16], expected_v[token])


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_the_cpu_runs_its_twins(case, has_norm):
    qkv, cache, arguments = inputs(case, "cpu", torch.float32)
    expected_qkv, expected_cache = qkv.clone(), cache.clone()
    options = {"norm_eps": 1e-6} | (norms(case[3], "cpu", torch.bfloat16) if has_norm else {})
    prepare_qkv(*arguments(qkv, cache), **options)
    prepare_qkv_ref(*arguments(expected_qkv, expected_cache), **options)
    torch.testing.assert_close(qkv[:, : case[1]], expected_qkv[:, : case[1]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cache, expected_cache, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("k", torch.zeros(3, 2, 16)),
        ("v", torch.zeros(2, 2, 16, dtype=torch.float16)),
        ("cos", torch.zeros(8, 9)),
        ("positions", torch.zeros(3, dtype=torch.int64)),
        ("v_cache", torch.zeros(3, 32, 2, 16)),
        ("slots", torch.zeros(2, dtype=torch.int32)),
        ("q_norm_D", torch.ones(16)),
        ("both_norms", torch.ones(8)),
        ("both_norms", torch.ones(32)[::2]),
    ],
)
def test_misfits_are_refused(change, value):
    tensors = {
        "q": torch.zeros(2, 4, 16),
        "k": torch.zeros(2, 2, 16),
        "v": torch.zeros(2, 2, 16),
        "cos": torch.zeros(8, 8),
        "sin": torch.zeros(8, 8),
        "positions": torch.zeros(2, dtype=torch.int64),
        "k_cache": torch.zeros(3, 16, 2, 16),
        "v_cache": torch.zeros(3, 16, 2, 16),
        "slots": torch.tensor([0, 1]),
    }
    prepare_qkv(*tensors.values(), norm_eps=1e-6)
    options = {"q_norm_D": value} if change == "q_norm_D" else {}
    if change == "both_norms":
        options = {"q_norm_D": value, "k_norm_D": value}
    elif change != "q_norm_D":
        tensors[change] = value
    with pytest.raises(ValueError, match=r"prepare_qkv|apply_rotary|store_kv"):
        prepare_qkv(*tensors.values(), norm_eps=1e-6, **options)
