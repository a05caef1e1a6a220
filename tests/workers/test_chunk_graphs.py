"""Steps with prompt tokens as they are recorded, padded to a size. On the CPU a function stands in for the graph."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from pilotfish.workers.chunk_graphs import chunk_sizes

from ..support.function_recorder import FunctionRecorder

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def requests(make_request):
    """Prompts of one token to more than a step takes, greedy, drawn, and with log probabilities."""
    rng = random.Random(5)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 2, 16, 30, 33, 64, 70, 100)]
    sampling = [{}, {"temperature": 0.9, "top_p": 0.9}, {"repetition_penalty": 1.2, "logprobs": 2}]
    return [make_request(f"r{i}", prompt, max_tokens=9 + 2 * i, seed=i, **sampling[i % 3]) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("in_flight", [1, 2], ids=["plain", "overlapped"])
@pytest.mark.parametrize("sizes", [[16, 32, 48, 64], [64], [40]], ids=str)
def test_padded_steps_give_the_same_text(run_requests, requests, in_flight, sizes):
    options = {"max_num_seqs": 5, "max_num_batched_tokens": 64}
    expected, recorder = run_requests(*requests, **options), FunctionRecorder()
    result = run_requests(
        *requests,
        **options,
        max_in_flight=in_flight,
        prepare=lambda runner: runner.use_graphs([2, 5], sizes, recorder=recorder),
    )
    assert result.tokens == expected.tokens
    for name, entries in expected.logprobs.items():
        assert [e.top for e in result.logprobs[name]] == [e.top for e in entries]
    assert len(recorder.replayed) > 10


def test_the_smallest_graph_that_wastes_little_is_taken(run_requests, make_request):
    def replays(*prompt_lens: int) -> int:
        recorder = FunctionRecorder()
        requests = [make_request(f"r{i}", [i] * length, max_tokens=1) for i, length in enumerate(prompt_lens)]
        run_requests(
            *requests,
            max_num_batched_tokens=200,
            prepare=lambda runner: runner.use_graphs([], [16, 64, 100, 200], recorder=recorder),
        )
        return len(recorder.replayed)

    assert replays(1) == replays(16) == replays(17) == replays(64) == 1  # the smallest sizes take all that fits
    assert replays(70) == 0  # 30 of 100 would be padding
    assert replays(75) == replays(30, 46) == replays(100) == replays(199) == 1
    assert replays(101) == 0


def test_padding_longer_than_a_sequence_takes_several_rows(run_requests, make_request):
    recorder = FunctionRecorder()
    options = {"num_kv_blocks": 2, "max_num_seqs": 4, "max_num_batched_tokens": 80}
    requests = [make_request(f"r{i}", [i + 1] * 4, max_tokens=3) for i in range(2)]
    expected = run_requests(*requests, **options)
    result = run_requests(*requests, **options, prepare=lambda runner: runner.use_graphs([], [64], recorder=recorder))
    assert result.tokens == expected.tokens
    assert recorder.replayed  # 8 tokens, and 56 of padding in rows of 32 and 24


def test_sizes_reach_the_largest_step_and_waste_little():
    assert chunk_sizes(8) == [8]
    assert chunk_sizes(40) == [16, 32, 40]
    for largest in (64, 100, 1000, 2048, 8192):
        sizes = chunk_sizes(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
        assert all(after - before <= max(16, after / 4) for before, after in pairwise(sizes) if after <= 1024)
        assert len(sizes) < 24


@pytest.mark.parametrize("in_flight", [1, 2], ids=["plain", "overlapped"])
@pytest.mark.parametrize("gpu", [pytest.param(True, marks=ON_GPU)], ids=[""])
def test_graphs_equal_eager(run_requests, requests, in_flight, gpu):
    options = {"device": "cuda", "max_num_seqs": 5, "max_num_batched_tokens": 64, "max_in_flight": in_flight}
    eager = run_requests(*requests, **options, cuda_graphs=False)
    assert run_requests(*requests, **options).tokens == eager.tokens
