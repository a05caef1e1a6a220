from dataclasses import replace

import pytest
import torch
from attention_case import Case, make
from pilotfish.kernels.attention_config import MAX_SPLITS, decode_config
from pilotfish.kernels.decode_attention import decode_attention
from pilotfish.kernels.paged_attention import TOLERANCE, paged_attention_ref

# Context lengths around the edges of blocks and splits; rows of other query lengths, which the kernels leave alone.
RAGGED = ((1, 1), (1, 31), (3, 40), (1, 33), (0, 9), (1, 200), (1, 64))
SMALL = {
    "ragged": Case(rows=RAGGED),
    "sinks": Case(rows=RAGGED, sinks=True),
    "window_within_a_split": Case(rows=RAGGED, window=20),
    "window_over_splits": Case(rows=RAGGED, window=70, sinks=True),
    "everything": Case(rows=RAGGED, heads=(6, 2), head_dim=24, window=50, soft_cap=3.0, sinks=True),
    "large_group": Case(rows=((1, 1), (1, 200)), heads=(36, 1)),
}
_LONG = tuple((1, 300 * i % 7001 + 1) for i in range(20))
LARGE = {
    "group_of_four": Case(rows=_LONG, heads=(32, 8), head_dim=128),
    "group_of_eight": Case(rows=_LONG, heads=(32, 4), head_dim=128, window=700, sinks=True),
    "head_dim_64": Case(rows=_LONG, heads=(64, 8), head_dim=64, sinks=True),
    "head_dim_256": Case(rows=_LONG, heads=(16, 8), head_dim=256, soft_cap=50.0),
}
CPU_CASES = {torch.float16: ("everything",)}
CUDA_CASES = {torch.float32: ("everything",), torch.float16: tuple(SMALL), torch.bfloat16: (*LARGE, "everything")}


def decode(tensors, options, **changes):
    """Every output of the kernels, the others NaN."""
    q, k_cache, _, tables, _, context_lens = tensors
    config = decode_config(
        num_rows=context_lens.shape[0],
        num_kv_heads=k_cache.shape[2],
        group=q.shape[1] // k_cache.shape[2],
        head_dim=q.shape[2],
        element_bytes=q.element_size(),
        max_keys=tables.shape[1] * k_cache.shape[1],
    )
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    options = {name: value for name, value in options.items() if name != "max_query_len"}
    decode_attention(out, *tensors, config=replace(config, **changes), **options)
    return out


def decoded_tokens(case):
    """Whether each token is the only query of its row."""
    return torch.tensor([query_len == 1 for query_len, _ in case.rows for _ in range(query_len)])


def assert_equals_reference(out, case, tensors, options):
    only = decoded_tokens(case).to(out.device)
    rtol, atol = TOLERANCE[out.dtype]
    torch.testing.assert_close(out[only], paged_attention_ref(*tensors, **options)[only], rtol=rtol, atol=atol)
    assert out[~only].isnan().all()


@pytest.mark.parametrize("num_splits", [1, 5])
def test_any_number_of_splits(device, dtype, case, num_splits):
    tensors, options = make(case, device, dtype)
    out = decode(tensors, options, num_splits=num_splits, block_j=16)
    assert_equals_reference(out, case, tensors, options)


def test_more_splits_than_blocks_of_keys(device):
    """And more than the combining kernel takes in one step."""
    case = Case(rows=((1, 1), (1, 33), (0, 9), (1, 70)), window=50, sinks=True)
    tensors, options = make(case, device)
    assert_equals_reference(decode(tensors, options, num_splits=40, block_j=16), case, tensors, options)


def test_nothing_but_the_visible_keys_is_read(device, dtype):
    """NaN before the window and after the context, rubbish in those entries of the table, in every split."""
    case = Case(rows=((1, 300), (1, 170)), head_dim=64, window=90)
    tensors, options = make(case, device, dtype)
    expected = decode(tensors, options, num_splits=4, block_j=32)
    _, k_cache, v_cache, tables, _, _ = tensors
    seen, used = torch.zeros(k_cache.shape[:2], dtype=torch.bool), torch.zeros(tables.shape, dtype=torch.bool)
    for row, (_, context_len) in enumerate(case.rows):
        for j in range(max(context_len - case.window, 0), context_len):
            seen[int(tables[row, j // case.page_len]), j % case.page_len] = True
            used[row, j // case.page_len] = True
    for cache in (k_cache, v_cache):
        cache[~seen.to(device)] = float("nan")
    tables[~used.to(device)] = -123456
    assert torch.equal(decode(tensors, options, num_splits=4, block_j=32), expected)


def test_padding_rows_of_a_captured_batch(device, dtype):
    """They see one key of page 0, whose block table is all zeros and as wide as the longest sequence there may be."""
    case = Case(rows=((1, 100), (1, 1), (1, 1)))
    tensors, options = make(case, device, dtype)
    q, k_cache, v_cache, tables, starts, context_lens = tensors
    wide = torch.zeros(tables.shape[0], 2560, dtype=torch.int32, device=device)
    wide[:1, : tables.shape[1]] = tables[:1]
    tensors = (q, k_cache, v_cache, wide, starts, context_lens)
    for num_splits in (1, 8):
        assert_equals_reference(decode(tensors, options, num_splits=num_splits), case, tensors, options)


def test_stale_partial_results_do_not_count(device, monkeypatch):
    """Splits without keys write nothing, and what the memory held before is not read."""
    case = Case(rows=((1, 40), (1, 500)))
    tensors, options = make(case, device, torch.float32)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    out = decode(tensors, options, num_splits=8, block_j=32)
    monkeypatch.undo()
    assert_equals_reference(out, case, tensors, options)


def test_same_bits_in_any_batch(device, dtype):
    """With one number of splits a row's result does not depend on the rows beside it."""
    case = Case(rows=((1, 150), (1, 7), (1, 90)))
    tensors, options = make(case, device, dtype)
    q, k_cache, v_cache, tables, _, context_lens = tensors
    together = decode(tensors, options, num_splits=3)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    alone = [
        decode(
            (q[i : i + 1], k_cache, v_cache, tables[i : i + 1], starts, context_lens[i : i + 1]),
            options,
            num_splits=3,
        )
        for i in range(len(case.rows))
    ]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 7])
def test_a_captured_graph_serves_other_contexts(num_splits):
    """Two calls in a row: the second starts early behind the first, and its combining kernel behind it."""
    case = Case(rows=((1, 5000), (1, 1), (1, 320)), heads=(32, 8), head_dim=128)
    tensors, options = make(case, "cuda", torch.bfloat16)
    decode(tensors, options, num_splits=num_splits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [decode(tensors, options, num_splits=num_splits) for _ in range(2)]
    for context_lens in ((5000, 1, 320), (17, 1, 64), (4096, 1, 2)):
        tensors[-1].copy_(torch.tensor(context_lens))
        graph.replay()
        for out in outputs:
            assert_equals_reference(out, case, tensors, options)


def test_shapes_alone_choose_the_number_of_splits():
    def splits(**changes):
        shape = {"num_rows": 1, "num_kv_heads": 8, "group": 4, "head_dim": 128, "element_bytes": 2, "max_keys": 40960}
        return decode_config(**(shape | changes)).num_splits

    assert 8 < splits() <= MAX_SPLITS
    assert splits(num_rows=128) == 1
    assert splits(max_keys=16) == 1
    assert [splits(num_rows=n) for n in (1, 2, 8, 32)] == sorted((splits(num_rows=n) for n in (1, 2, 8, 32)), reverse=True)
