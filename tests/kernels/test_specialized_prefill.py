"""The CUDA C++ kernel of prefill: on a GPU against the reference; anywhere, what it serves and how it is compiled."""

import pytest
import torch
from attention_case import Case, make
from pilotfish.kernels import specialized_prefill as module
from pilotfish.kernels.attention_config import SPECIALIZED_PREFILL_CONFIGS, specialized_prefill_config
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.paged_attention import TOLERANCE, paged_attention, paged_attention_ref
from pilotfish.kernels.specialized_prefill import SOURCE, shared_bytes, specialized_prefill, unfit_reason

# Around the edges of tiles, of steps of keys and of boxes of 16; rows of one and of no query; prefixes longer than prompts.
RAGGED = ((33, 33), (16, 40), (1, 20), (0, 9), (5, 64), (129, 131), (2, 31), (300, 1000), (64, 128), (1, 1))
MANY = tuple((37 * i % 90, 37 * i % 90 + 53 * i % 300 + 1) for i in range(70))
CASES = {
    "ragged": Case(rows=RAGGED, heads=(8, 2), head_dim=128),
    "more_rows_than_lanes": Case(rows=MANY, heads=(32, 8), head_dim=128),
    "one_head_a_group": Case(rows=RAGGED, heads=(2, 2), head_dim=128),
    "three_heads_a_group": Case(rows=RAGGED, heads=(9, 3), head_dim=64),
    "sixteen_heads_a_group": Case(rows=RAGGED, heads=(32, 2), head_dim=128),
    "long_pages": Case(rows=RAGGED, heads=(32, 4), head_dim=128, page_len=256),
    "prompts": Case(rows=((512, 512),) * 5 + ((700, 4000),), heads=(32, 8), head_dim=128),
}


def make_dirty(case, dtype, device="cuda"):
    """What lies behind a row's keys is NaN in the cache, and no page at all in its table."""
    tensors, options = make(case, device, dtype)
    _, k_cache, v_cache, tables, _, _ = tensors
    for row, (_, context_len) in enumerate(case.rows):
        num_pages = -(-context_len // case.page_len)
        last = tables[row, num_pages - 1].long()
        for cache in (k_cache, v_cache):
            cache[last, (context_len - 1) % case.page_len + 1 :] = float("nan")
        tables[row, num_pages:] = 2**30
    return tensors, options


def prefill(tensors, options, config, *, skip_one_query=False):
    """Every output of the kernel, the others NaN."""
    out = torch.full_like(tensors[0], float("nan"), memory_format=torch.contiguous_format)
    specialized_prefill(out, *tensors, config=config, skip_one_query=skip_one_query, scale=options["scale"])
    return out


def assert_right(case, dtype, config):
    tensors, options = make_dirty(case, dtype)
    rtol, atol = TOLERANCE[dtype]
    expected = paged_attention_ref(*tensors, **options)
    torch.testing.assert_close(prefill(tensors, options, config), expected, rtol=rtol, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("config", SPECIALIZED_PREFILL_CONFIGS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, config):
    assert_right(CASES[name], torch.bfloat16, config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged", "three_heads_a_group"])
def test_equals_reference_in_float16(name):
    assert_right(CASES[name], torch.float16, specialized_prefill_config())


@pytest.mark.gpu
def test_rows_of_one_query_are_left_to_decode():
    tensors, options = make_dirty(CASES["ragged"], torch.bfloat16)
    out = prefill(tensors, options, specialized_prefill_config(), skip_one_query=True)
    skipped = torch.tensor([length == 1 for length, _ in RAGGED for _ in range(length)], device="cuda")
    rtol, atol = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(out[~skipped], paged_attention_ref(*tensors, **options)[~skipped], rtol=rtol, atol=atol)
    assert out[skipped].isnan().all()


@pytest.mark.gpu
def test_a_captured_graph_serves_other_prompts_and_its_bits_repeat():
    """Two calls in a row, the second started early behind the first; the last lengths leave no tile at all."""
    tensors, options = make(Case(rows=((200, 200), (312, 400)), heads=(32, 8), head_dim=128), "cuda", torch.bfloat16)
    q, *_, starts, _ = tensors
    config = specialized_prefill_config()
    prefill(tensors, options, config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [prefill(tensors, options, config) for _ in range(2)]
    rtol, atol = TOLERANCE[q.dtype]
    for first_len, second_len in ((200, 312), (199, 312), (120, 1), (1, 0), (0, 0)):
        starts[1] = first_len
        starts[2] = num_tokens = first_len + second_len
        q.copy_(torch.randn_like(q))
        graph.replay()
        expected = paged_attention_ref(*tensors, **options)
        assert torch.equal(outputs[0][:num_tokens], outputs[1][:num_tokens])
        torch.testing.assert_close(outputs[0][:num_tokens], expected[:num_tokens], rtol=rtol, atol=atol)


@pytest.mark.gpu
def test_op_takes_the_kernel_where_it_serves_and_agrees_with_tritons(monkeypatch):
    tensors, options = make_dirty(CASES["ragged"], torch.bfloat16)
    calls = []
    target = "pilotfish.kernels.paged_attention."
    monkeypatch.setattr(target + "specialized_prefill", lambda *a, **o: calls.append(1) or specialized_prefill(*a, **o))
    out = paged_attention(*tensors, **options)
    paged_attention(*tensors, **options | {"window": 50})
    assert calls == [1]
    monkeypatch.setattr(target + "unfit_reason", lambda *_, **__: "not today")
    rtol, atol = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(paged_attention(*tensors, **options), out, rtol=rtol, atol=atol)
    assert calls == [1]


# --- anywhere


def test_what_it_does_not_serve_has_a_reason():
    def reason(dtype=torch.bfloat16, **changes):
        (q, k_cache, v_cache, *_), _ = make(Case(rows=((3, 20),), **{"head_dim": 128} | changes), "cpu", dtype)
        return unfit_reason(q, k_cache, v_cache, config=specialized_prefill_config())

    assert "it is for compute capability 9.0" in reason()
    assert "heads of 96" in reason(head_dim=96)
    assert "256 query heads a kv head" in reason(heads=(256, 1))
    assert "float32" in reason(torch.float32)


@pytest.mark.parametrize("config", SPECIALIZED_PREFILL_CONFIGS, ids=str)
def test_configs_fit_in_shared_memory(config):
    assert shared_bytes(config, head_dim=128) <= module.MAX_SHARED_BYTES


def test_nvrtc_compiles_it(nvrtc):
    code = (loader.SOURCE_DIR / f"{SOURCE}.cu").read_bytes()
    for config, head_dim, group in ((SPECIALIZED_PREFILL_CONFIGS[0], 128, 4), (SPECIALIZED_PREFILL_CONFIGS[-1], 64, 3)):
        macros = module.macros(config, head_dim=head_dim, group=group, dtype=torch.bfloat16)
        assert loader.compile_source(code, SOURCE, loader._compile_options(macros)).startswith(b"\x7fELF")
