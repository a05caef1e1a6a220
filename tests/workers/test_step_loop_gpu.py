"""The loop on a GPU gives the text that it gives on the CPU, plain and overlapped."""

from __future__ import annotations

import random

import pytest
import torch
from pilotfish.common.requests import FinishReason
from pilotfish.kernels import dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LOUD = {
    "temperature": 1.2,
    "top_k": 60,
    "top_p": 0.95,
    "min_p": 0.001,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.4,
    "min_tokens": 3,
    "end_token_ids": (257,),
    "logit_bias": {5: 2.0, 300: -3.0},
    "bad_words_ids": ((17,), (4, 9, 11)),
    "logprobs": 3,
}


@pytest.fixture(params=[1, 2], ids=["plain", "overlapped"])
def on_gpu(request) -> dict:
    return {"device": "cuda", "max_in_flight": request.param}


@pytest.fixture
def requests(make_request):
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 2, 15, 16, 17, 33, 70, 100)]
    return [
        make_request(f"r{i}", prompt, max_tokens=24 + i, seed=i, **(LOUD if i % 2 else {})) for i, prompt in enumerate(prompts)
    ]


def test_text_and_logprobs_equal_those_of_the_cpu(run_requests, requests, on_gpu):
    options = {"max_num_seqs": 5, "max_num_batched_tokens": 64}
    expected = run_requests(*requests, **options)
    result = run_requests(*requests, **options, **on_gpu)
    assert result.tokens == expected.tokens
    for name, entries in expected.logprobs.items():
        ours = result.logprobs[name]
        assert [entry.rank for entry in ours] == [entry.rank for entry in entries]
        assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in entries], abs=1e-3)


def test_preemption_changes_nothing(run_requests, requests, on_gpu):
    tight = run_requests(*requests, num_kv_blocks=9, **on_gpu)
    assert tight.steps[-1].load.num_preemptions > 0
    assert tight.tokens == run_requests(*requests).tokens


def test_invariant_kernels_give_a_request_its_own_bits(run_requests, requests, on_gpu, monkeypatch):
    """Alone, among others, in chunks and after a preemption."""
    with monkeypatch.context() as patch:
        patch.setenv("PILOTFISH_KERNELS", "invariant")
        dispatch.kernel_mode.cache_clear()
        crowded = run_requests(*requests, max_num_batched_tokens=64, **on_gpu)
        tight = run_requests(*requests, num_kv_blocks=9, **on_gpu)
        alone = [run_requests(request, **on_gpu) for request in requests]
    dispatch.kernel_mode.cache_clear()
    for name in crowded.tokens:
        (own,) = (result for result in alone if name in result.tokens)
        assert crowded.tokens[name] == tight.tokens[name] == own.tokens[name]
        assert crowded.logprobs[name] == tight.logprobs[name] == own.logprobs[name]


def test_a_step_too_large_for_the_memory_runs_in_parts(run_requests, requests, on_gpu):
    def need_memory(model):
        forward = model.forward

        def wrapped(batch):
            if len(batch.token_ids_T) > 40:
                torch.empty(10**15, device="cuda")
            return forward(batch)

        model.forward = wrapped
        return model

    expected = run_requests(*requests).tokens
    result = run_requests(*requests, wrap=need_memory, cuda_graphs=False, **on_gpu)  # a graph has its memory
    long = {f"r{i}" for i in (6, 7)}  # of 70 and 100 tokens: too large even alone
    assert {name for name in result.ended if result.reason(name) is FinishReason.ERROR} == long
    assert all("OutOfMemoryError" in result.ended[name].error for name in long)
    assert all(result.tokens[name] == expected[name] for name in expected if name not in long)


def test_the_cache_is_sized_from_measured_memory(make_loop, collector):
    loop = make_loop(collector, device="cuda", num_kv_blocks=None)
    assert loop.scheduler.config.num_blocks == 32 * 512 // 16


def test_steps_are_timed_by_the_device(run_requests, requests, on_gpu):
    result = run_requests(*requests, **on_gpu)
    assert all(step.timings.forward_ms > 0 for step in result.steps)
    assert any(step.timings.sample_ms > 0 for step in result.steps)
