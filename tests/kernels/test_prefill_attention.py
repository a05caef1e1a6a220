from dataclasses import replace

import pytest
import torch
from attention_case import Case, make
from pilotfish.kernels.attention_config import prefill_config
from pilotfish.kernels.paged_attention import TOLERANCE, paged_attention_ref
from pilotfish.kernels.prefill_attention import prefill_attention

# Query and context lengths around the edges of tiles and of blocks of keys; rows of one and of no query.
RAGGED = ((33, 33), (16, 40), (1, 20), (0, 9), (5, 64), (2, 31))
SMALL = {
    "ragged": Case(rows=RAGGED),
    "keys_of_one_page": Case(rows=RAGGED, page_len=64),
    "window": Case(rows=RAGGED, window=7, page_len=32),
    "everything": Case(rows=RAGGED, heads=(6, 2), head_dim=24, window=20, soft_cap=3.0, sinks=True),
}
LARGE = {
    "prompts": Case(rows=((512, 512),) * 5 + ((300, 1000),), heads=(32, 8), head_dim=128),
    "prompts_of_one_page": Case(rows=((700, 700), (2, 999)), heads=(32, 4), head_dim=128, page_len=256),
    "prompts_window": Case(rows=((700, 900), (130, 131)), heads=(16, 8), head_dim=128, window=100, sinks=True),
}
CPU_CASES = {torch.float16: ("everything",)}
CUDA_CASES = {torch.float32: (), torch.float16: ("keys_of_one_page", "everything"), torch.bfloat16: tuple(LARGE)}


def prefill(tensors, options, *, skip_one_query=False, **changes):
    """Every output of the kernel, the others NaN."""
    q, k_cache, *_ = tensors
    config = prefill_config(group=q.shape[1] // k_cache.shape[2], head_dim=q.shape[2], element_bytes=q.element_size())
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    options = {name: value for name, value in options.items() if name != "max_query_len"}
    prefill_attention(out, *tensors, config=replace(config, **changes), skip_one_query=skip_one_query, **options)
    return out


@pytest.mark.parametrize("products_overlap", [True, False])
@pytest.mark.parametrize("block_j", [16, 64])
def test_any_launch_parameters(device, dtype, case, block_j, products_overlap):
    tensors, options = make(case, device, dtype)
    out = prefill(tensors, options, block_j=block_j, products_overlap=products_overlap, max_registers=None)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, paged_attention_ref(*tensors, **options), rtol=rtol, atol=atol)


def test_rows_of_one_query_are_left_to_decode(device, dtype):
    tensors, options = make(SMALL["ragged"], device, dtype)
    out = prefill(tensors, options, skip_one_query=True)
    rtol, atol = TOLERANCE[dtype]
    skipped = torch.tensor([length == 1 for length, _ in RAGGED for _ in range(length)], device=device)
    expected = paged_attention_ref(*tensors, **options)
    torch.testing.assert_close(out[~skipped], expected[~skipped], rtol=rtol, atol=atol)
    assert out[skipped].isnan().all()


@pytest.mark.gpu
def test_a_captured_graph_serves_other_prompts():
    """Two calls in a row, the second started early behind the first."""
    tensors, options = make(Case(rows=((200, 200), (312, 400)), heads=(32, 8), head_dim=128), "cuda", torch.bfloat16)
    q, *_, starts, _ = tensors
    prefill(tensors, options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [prefill(tensors, options) for _ in range(2)]
    rtol, atol = TOLERANCE[q.dtype]
    for first_len in (200, 199, 120):
        starts[1] = first_len
        starts[2] = first_len + 312
        q.copy_(torch.randn_like(q))
        graph.replay()
        expected = paged_attention_ref(*tensors, **options)
        for out in outputs:
            torch.testing.assert_close(out[: first_len + 312], expected[: first_len + 312], rtol=rtol, atol=atol)


def test_two_programs_share_a_multiprocessor():
    """128 rows of head_dim 128: 128 registers of each of 256 threads are half of the 65536."""
    config = prefill_config(group=4, head_dim=128, element_bytes=2)
    assert config.num_warps * 32 * config.max_registers * 2 == 65536
    assert prefill_config(group=4, head_dim=256, element_bytes=2).max_registers is None
    assert prefill_config(group=4, head_dim=128, element_bytes=4).max_registers is None
