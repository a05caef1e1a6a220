"""The CUDA C++ kernel of decode steps: on a GPU against the references; anywhere, what it serves and how it is compiled."""

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from pilotfish.kernels import paged_attention as attention_module
from pilotfish.kernels import qkv_prepare
from pilotfish.kernels.attend import prepare_and_attend
from pilotfish.kernels.attention_config import FusedDecodeConfig, fused_decode_config
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.fused_decode import SOURCE, fused_decode, shared_bytes, unfit_reason
from pilotfish.kernels.paged_attention import paged_attention_ref
from pilotfish.kernels.qkv_prepare import prepare_qkv_ref

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """`lengths`: keys of each row, the new one included."""

    lengths: tuple[int, ...]
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 128
    page_len: int = 16
    norms: bool = True
    window: int | None = None
    sinks: bool = False


RAGGED = (1, 2, 16, 17, 31, 32, 33, 100, 511, 512, 513, 700)
CASES = {
    "ragged": Case(RAGGED),
    "without_norms": Case(RAGGED, norms=False),
    "one_head_a_group": Case(RAGGED, heads=(3, 3)),
    "two_heads_a_group": Case(RAGGED, heads=(16, 8)),
    "three_heads_a_group": Case(RAGGED, heads=(9, 3), head_dim=64, norms=False),
    "eight_heads_a_group": Case(RAGGED, heads=(32, 4)),
    "long_pages": Case(RAGGED, page_len=64),
    "window": Case(RAGGED, window=40),
    "window_of_one": Case(RAGGED, window=1),
    "gpt_oss": Case(RAGGED, heads=(64, 8), head_dim=64, norms=False, window=128, sinks=True),
    "sinks": Case(RAGGED, sinks=True),
    "long": Case((9000, 5, 4097), heads=(32, 8)),
    "many": Case(tuple(37 * i % 1500 + 1 for i in range(130)), heads=(32, 8)),
}
CONFIGS = [FusedDecodeConfig(num_splits=s, num_warps=w, num_stages=n) for s, (w, n) in product((1, 2, 4, 8), ((4, 3), (8, 2)))]


def make(case, device, dtype):
    """Arguments of prepare_and_attend; what lies behind a row's keys is NaN. The first of two rows of padding has no slot."""
    generator = torch.Generator(device).manual_seed(len(case.lengths))
    num_heads, num_kv_heads = case.heads
    pages = [-(-length // case.page_len) for length in case.lengths]
    order = torch.randperm(sum(pages), generator=generator, device=device).int()
    tables = torch.zeros(len(pages), max(pages) + 3, dtype=torch.int32, device=device)
    cache = torch.randn(2, sum(pages), case.page_len, num_kv_heads, case.head_dim, generator=generator, device=device).to(dtype)
    for row, (count, own) in enumerate(zip(pages, order.split(pages), strict=True)):
        tables[row, :count] = own
        behind = (case.lengths[row] - 1) % case.page_len
        cache[:, int(own[-1]), behind:] = float("nan")  # the new key's place too: it is written
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    positions = lengths.long() - 1
    slots = tables.long().gather(1, (positions // case.page_len)[:, None])[:, 0] * case.page_len + positions % case.page_len
    frequencies = 10000.0 ** -(torch.arange(0, case.head_dim, 2, device=device) / case.head_dim)
    angles = torch.arange(max(case.lengths), device=device)[:, None] * frequencies
    qkv = torch.randn(len(pages), num_heads + 2 * num_kv_heads, case.head_dim, generator=generator, device=device).to(dtype)
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    starts = torch.arange(len(pages) + 1, dtype=torch.int32, device=device)
    gains = (1 + torch.randn(2, case.head_dim, generator=generator, device=device)).to(dtype)
    sinks = torch.randn(num_heads, generator=generator, device=device).to(dtype) if case.sinks else None
    options = {
        "q_norm_D": gains[0] if case.norms else None,
        "k_norm_D": gains[1] if case.norms else None,
        "norm_eps": EPS,
        "scale": case.head_dim**-0.5,
        "window": case.window,
        "sinks_N": sinks,
    }
    return (q, k, v, angles.cos(), angles.sin(), positions, cache[0], cache[1], slots, tables, starts, lengths), options


def reference(arguments, options):
    """(out, keys, values) by the references, of copies."""
    q, k, v, cos, sin, positions, k_cache, v_cache, slots, tables, starts, lengths = arguments
    q, k, k_cache, v_cache = q.clone(), k.clone(), k_cache.clone(), v_cache.clone()
    norms = {name: options[name] for name in ("q_norm_D", "k_norm_D", "norm_eps")}
    prepare_qkv_ref(q, k, v, cos, sin, positions, k_cache, v_cache, slots, **norms)
    rest = {"scale": options["scale"], "window": options["window"], "sinks_N": options["sinks_N"]}
    return paged_attention_ref(q, k_cache, v_cache, tables, starts, lengths, max_query_len=1, **rest), k_cache, v_cache


def assert_right(case, dtype, config):
    arguments, options = make(case, "cuda", dtype)
    expected, keys, values = reference(arguments, options)
    q, k, v, cos, sin, _, k_cache, v_cache, slots, tables, _, lengths = arguments
    torch.cuda.synchronize()
    out = fused_decode(q, k, v, cos, sin, k_cache, v_cache, slots, tables, lengths, config=config, **options)
    rtol, atol = attention_module.TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    rtol, atol = qkv_prepare.TOLERANCE[dtype]
    torch.testing.assert_close(k_cache, keys, rtol=rtol, atol=atol, equal_nan=True)
    torch.testing.assert_close(v_cache, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_equals_references(name):
    for config in CONFIGS:
        assert_right(CASES[name], torch.bfloat16, config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged", "gpt_oss", "eight_heads_a_group"])
def test_equals_references_in_float16(name):
    assert_right(CASES[name], torch.float16, CONFIGS[4])


@pytest.mark.gpu
def test_a_token_without_slot_is_not_stored():
    arguments, options = make(CASES["ragged"], "cuda", torch.bfloat16)
    q, k, v, cos, sin, _, k_cache, v_cache, slots, tables, _, lengths = arguments
    before, slots[:] = k_cache.clone(), -1
    fused_decode(q, k, v, cos, sin, k_cache, v_cache, slots, tables, lengths, config=CONFIGS[2], **options)
    assert torch.equal(k_cache.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.gpu
def test_bits_repeat_also_in_a_graph():
    arguments, options = make(CASES["many"], "cuda", torch.bfloat16)
    options |= {"max_query_len": 1, "min_query_len": 1, "soft_cap": None}
    expected = prepare_and_attend(*arguments, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [prepare_and_attend(*arguments, **options) for _ in range(5)]
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.gpu
def test_op_takes_the_kernel_where_it_serves_and_agrees_with_the_two_ops(monkeypatch):
    arguments, options = make(CASES["ragged"], "cuda", torch.bfloat16)
    options |= {"max_query_len": 1, "min_query_len": 1, "soft_cap": None}
    calls = []
    monkeypatch.setattr("pilotfish.kernels.attend.fused_decode", lambda *a, **o: calls.append(1) or fused_decode(*a, **o))
    fused = prepare_and_attend(*arguments, **options)
    assert calls == [1]
    monkeypatch.setattr("pilotfish.kernels.attend.unfit_reason", lambda *_: "not today")
    rtol, atol = attention_module.TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(prepare_and_attend(*arguments, **options), fused, rtol=rtol, atol=atol)
    assert calls == [1]


# --- anywhere


@pytest.mark.parametrize("name", ["ragged", "gpt_oss"])
def test_op_is_the_two_ops_on_a_cpu(name):
    case = replace(CASES[name], lengths=(1, 17, 40))
    arguments, options = make(case, "cpu", torch.float32)
    expected, keys, values = reference(arguments, options)
    out = prepare_and_attend(*arguments, **options, max_query_len=1, min_query_len=1, soft_cap=None)
    rtol, atol = attention_module.TOLERANCE[torch.float32]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(arguments[6], keys, equal_nan=True)
    torch.testing.assert_close(arguments[7], values, equal_nan=True)


def test_what_it_does_not_serve_has_a_reason():
    def reason(case, dtype=torch.bfloat16):
        (q, k, v, cos, _, _, k_cache, *_), options = make(replace(case, lengths=(3, 20)), "cpu", dtype)
        return unfit_reason(q, k, v, cos, k_cache, options["sinks_N"])

    case = CASES["ragged"]
    assert "it is for compute capability 9.0" in reason(case)
    assert "heads of 96" in reason(replace(case, head_dim=96))
    assert "16 query heads a kv head" in reason(replace(case, heads=(16, 1)))
    assert "float32" in reason(case, torch.float32)


def test_configs_fit_in_shared_memory_and_their_splits_divide_the_outputs():
    for num_rows, num_kv_heads, head_dim, group in product((1, 8, 33, 128, 512), (1, 3, 4, 8), (64, 128), range(1, 9)):
        config = fused_decode_config(num_rows=num_rows, num_kv_heads=num_kv_heads)
        assert shared_bytes(config, head_dim=head_dim, group=group) <= loader.MAX_SHARED_BYTES
        assert group * head_dim // 4 % config.num_splits == 0


def test_nvrtc_compiles_it(nvrtc):
    code = (loader.SOURCE_DIR / f"{SOURCE}.cu").read_bytes()
    for head_dim, group, num_warps, num_stages in ((128, 4, 4, 3), (64, 8, 8, 2)):
        macros = (("HEAD_DIM", head_dim), ("GROUP", group), ("WARPS", num_warps), ("STAGES", num_stages), ("FLOAT16", 0))
        assert loader.compile_source(code, SOURCE, loader._compile_options(macros)).startswith(b"\x7fELF")
