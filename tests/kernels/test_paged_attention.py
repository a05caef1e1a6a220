from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_case import Case, make
from pilotfish.kernels import paged_attention as module
from pilotfish.kernels.paged_attention import TOLERANCE, _paged_attention_triton, paged_attention, paged_attention_ref
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

MIXED = ((1, 40), (5, 5), (0, 7), (1, 1), (3, 19))
SMALL = {
    "mixed": Case(rows=MIXED),
    "decode": Case(rows=((1, 1), (1, 17), (1, 33))),
    "decode_with_idle_row": Case(rows=((1, 20), (0, 3), (1, 4))),
    "one_row": Case(rows=((9, 30),)),
    "empty": Case(rows=()),
    "group_of_three": Case(rows=MIXED, heads=(9, 3), head_dim=24),
    "many_heads_a_group": Case(rows=((2, 5), (1, 3)), heads=(36, 1)),
    "one_head_a_group": Case(rows=MIXED, heads=(3, 3), page_len=32),
    "window": Case(rows=MIXED, window=4),
    "window_of_one": Case(rows=MIXED, window=1),
    "window_past_tiles": Case(rows=((2, 300), (1, 280)), head_dim=64, window=10),
    "window_behind_a_long_prefill": Case(rows=((64, 164),), window=4),
    "many_tiles": Case(rows=((2, 300), (1, 140)), head_dim=64),
    "soft_cap": Case(rows=MIXED, soft_cap=5.0),
    "sinks": Case(rows=MIXED, sinks=True),
    "everything": Case(rows=MIXED, heads=(6, 2), head_dim=20, window=6, soft_cap=3.0, sinks=True),
}
_SERVING = (*((1, 37 * i % 3000 + 1) for i in range(60)), (700, 700), (513, 2048), (130, 131), (1, 4096))
LARGE = {
    "serving": Case(rows=_SERVING, heads=(32, 8), head_dim=128),
    "serving_window": Case(rows=_SERVING, heads=(32, 8), head_dim=128, window=512),
    "serving_sinks": Case(rows=_SERVING, heads=(64, 8), head_dim=64, window=128, sinks=True),
    "serving_cap": Case(rows=_SERVING, heads=(16, 8), head_dim=256, soft_cap=50.0, page_len=64),
    "decode_long": Case(rows=((1, 32768),) * 3 + ((1, 5),), heads=(28, 4), head_dim=128, page_len=128),
    "decode_one_group": Case(rows=((1, 1000),) * 40, heads=(71, 1), head_dim=64),
    "head_dim_80": Case(rows=((300, 300), (1, 77)), heads=(32, 32), head_dim=80, page_len=256),
    "head_dim_192": Case(rows=((300, 500), (1, 77)), heads=(16, 4), head_dim=192, page_len=32),
    "head_dim_576": Case(rows=((100, 500), (1, 77)), heads=(16, 1), head_dim=576),
}
CPU_CASES = {torch.float16: ("mixed", "many_tiles", "everything")}
CUDA_CASES = {torch.float32: ("everything",), torch.float16: tuple(SMALL), torch.bfloat16: (*LARGE, "everything")}
# Compiling is what costs on a GPU: these would add no other feature.
CUDA_CASES[torch.float16] = tuple(name for name in SMALL if name not in ("window_of_one", "many_tiles", "sinks", "soft_cap"))
RUN = {"cpu": _paged_attention_triton, "cuda": paged_attention}


@pytest.mark.parametrize("name", ["mixed", "group_of_three", "window", "soft_cap", "sinks", "one_head_a_group"])
def test_reference_equals_transformers(name):
    case = SMALL[name]
    tensors, options = make(case)
    q, k_cache, v_cache, tables, starts, _ = tensors
    out = paged_attention_ref(*tensors, **options)
    module = SimpleNamespace(
        num_key_value_groups=case.heads[0] // case.heads[1], sinks=options["sinks_N"], training=False, head_dim=case.head_dim
    )
    for row, (query_len, context_len) in enumerate(case.rows):
        if query_len == 0:
            continue
        slots = [int(tables[row, j // case.page_len]) * case.page_len + j % case.page_len for j in range(context_len)]
        k, v = (cache.flatten(0, 1)[slots].transpose(0, 1)[None] for cache in (k_cache, v_cache))
        queries = q[starts[row] : starts[row + 1]].transpose(0, 1)[None]
        behind = torch.arange(context_len)[context_len - query_len :, None] - torch.arange(context_len)
        hidden = (behind < 0) | (behind >= (case.window or context_len))
        mask = torch.zeros(query_len, context_len).masked_fill(hidden, float("-inf"))
        if case.sinks:
            expected, _ = gpt_oss_attention(module, queries, k, v, mask, options["scale"])
        else:
            expected, _ = gemma2_attention(module, queries, k, v, mask, scaling=options["scale"], softcap=case.soft_cap)
        torch.testing.assert_close(out[starts[row] : starts[row + 1]], expected[0], rtol=1e-5, atol=1e-6)


def test_kernel_equals_reference(device, dtype, case):
    tensors, options = make(case, device, dtype)
    out = RUN[device](*tensors, **options)
    assert out.is_contiguous()
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, paged_attention_ref(*tensors, **options), rtol=rtol, atol=atol)


def test_nothing_but_the_visible_keys_is_read(device, dtype):
    """NaN wherever no query looks: behind the window, after the context, in pages of others; the tables hold rubbish there."""
    case = Case(rows=((1, 300), (3, 290), (20, 20)), head_dim=64, window=10)
    tensors, options = make(case, device, dtype)
    expected = RUN[device](*tensors, **options)
    q, k_cache, v_cache, tables, starts, context_lens = tensors
    seen = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
    used = torch.zeros(tables.shape, dtype=torch.bool)
    for row, (query_len, context_len) in enumerate(case.rows):
        for j in range(max(context_len - query_len - case.window + 1, 0), context_len):
            seen[int(tables[row, j // case.page_len]), j % case.page_len] = True
            used[row, j // case.page_len] = True
    for cache in (k_cache, v_cache):
        cache[~seen.to(device)] = float("nan")
    tables[~used.to(device)] = -123456
    assert torch.equal(RUN[device](q, k_cache, v_cache, tables, starts, context_lens, **options), expected)


def test_prefill_in_chunks_equals_prefill_at_once(device, dtype):
    whole, options = make(Case(rows=((24, 24),)), device, dtype)
    q, k_cache, v_cache, tables, _, _ = whole
    outputs = []
    for start, end in ((0, 7), (7, 8), (8, 24)):
        ends = torch.tensor([[0, end - start], [end, 0]], dtype=torch.int32, device=device)
        chunk_options = options | {"max_query_len": end - start}
        outputs.append(RUN[device](q[start:end], k_cache, v_cache, tables, ends[0], ends[1, :1], **chunk_options))
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(torch.cat(outputs), RUN[device](*whole, **options), rtol=rtol, atol=atol)


def test_cache_of_another_dtype(device):
    (q, *caches_and_rows), options = make(SMALL["mixed"], device, torch.float16)
    q = q.float()
    out = RUN[device](q, *caches_and_rows, **options)
    rtol, atol = TOLERANCE[torch.float32]
    torch.testing.assert_close(out, paged_attention_ref(q, *caches_and_rows, **options), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("rows", "launched"),
    [
        (((5, 5), (3, 19)), ["prefill"]),
        (((1, 20), (1, 4)), ["decode"]),
        (((1, 40), (5, 5)), ["decode", "prefill"]),
        (((9, 30),), ["prefill"]),
        (((1, 30),), ["decode"]),
        (((0, 3), (2, 4)), ["decode", "prefill"]),  # a row without queries hides whether there is one with one
    ],
)
def test_only_kernels_with_rows_are_launched(device, monkeypatch, rows, launched):
    seen = []
    for name in ("decode", "prefill"):
        run = getattr(module, f"{name}_attention")
        record = lambda *args, name=name, run=run, **options: (seen.append(name), run(*args, **options))  # noqa: E731
        monkeypatch.setattr(module, f"{name}_attention", record)
    tensors, options = make(Case(rows=rows), device)
    out = RUN[device](*tensors, **options, min_query_len=min(length for length, _ in rows))
    assert seen == launched
    rtol, atol = TOLERANCE[torch.float32]
    torch.testing.assert_close(out, paged_attention_ref(*tensors, **options), rtol=rtol, atol=atol)


def test_large_scores_do_not_overflow(device):
    tensors, options = make(replace(SMALL["mixed"], sinks=True), device)
    tensors[0].mul_(1e4)
    out = RUN[device](*tensors, **options)
    torch.testing.assert_close(out, paged_attention_ref(*tensors, **options), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 5, 16)}, "multiple"),
        ({"q": torch.zeros(4, 4, 8)}, "head_dim"),
        ({"q": torch.zeros(4, 16, 4).transpose(1, 2)}, "contiguous"),
        ({"v_cache": torch.zeros(3, 16, 2, 16, dtype=torch.float16)}, "differ"),
        ({"v_cache": torch.zeros(3, 2, 16, 16).transpose(1, 2)}, "strides"),
        ({"k_cache": torch.zeros(3, 24, 2, 16), "v_cache": torch.zeros(3, 24, 2, 16)}, "power of two"),
        ({"k_cache": torch.zeros(3, 8, 2, 16), "v_cache": torch.zeros(3, 8, 2, 16)}, "power of two"),
        ({"tables": torch.zeros(2, 3, dtype=torch.int64)}, "int32"),
        ({"starts": torch.zeros(2, dtype=torch.int32)}, "query starts"),
        ({"sinks_N": torch.zeros(2)}, "sinks"),
        ({"scale": 0.0}, "scale"),
        ({"window": 0}, "window"),
        ({"soft_cap": 0.0}, "soft_cap"),
    ],
)
def test_misfits_are_refused(change, message):
    arguments = {
        "q": torch.zeros(4, 4, 16),
        "k_cache": torch.zeros(3, 16, 2, 16),
        "v_cache": torch.zeros(3, 16, 2, 16),
        "tables": torch.zeros(2, 3, dtype=torch.int32),
        "starts": torch.tensor([0, 3, 4], dtype=torch.int32),
        "context_lens": torch.tensor([3, 5], dtype=torch.int32),
    }
    options = {"max_query_len": 3, "scale": 1.0}
    paged_attention(*arguments.values(), **options)
    tensors = [change.get(name, value) for name, value in arguments.items()]
    options |= {name: value for name, value in change.items() if name not in arguments}
    with pytest.raises(ValueError, match=message):
        paged_attention(*tensors, **options)
