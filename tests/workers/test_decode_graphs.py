"""Decode steps as they are captured: padded to a size, by shapes alone. On the CPU a function stands in for the CUDA graph."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from pilotfish.kernels import dispatch, head_race
from pilotfish.kernels.race import HeadScores
from pilotfish.models.layers import embedding
from pilotfish.workers.decode_graphs import graph_sizes
from pilotfish.workers.sampler import Sampled

from ..support.function_recorder import FunctionRecorder

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


LOUD = {
    "temperature": 1.2,
    "top_k": 60,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.4,
    "min_tokens": 3,
    "end_token_ids": (257,),
    "logit_bias": {5: 2.0, 300: -3.0},
    "bad_words_ids": ((17,), (4, 9, 11)),
    "logprobs": 3,
}


@pytest.fixture
def requests(make_request):
    """Greedy ones, sampled ones, and some with every rule: the plain draw and the other one come up in turn."""
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 2, 15, 16, 17, 33, 70, 100)]
    sampling = [{}, {"temperature": 0.9, "top_p": 0.9}, LOUD]
    return [
        make_request(f"r{i}", prompt, max_tokens=12 + 3 * i, seed=i, **sampling[i % 3 if i > 4 else i % 2])
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("in_flight", [1, 2], ids=["plain", "overlapped"])
@pytest.mark.parametrize("sizes", [[1, 2, 4, 8], [5]], ids=str)
def test_padded_steps_give_the_same_text(run_requests, requests, in_flight, sizes):
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    expected = run_requests(*requests, **options)
    result = run_requests(
        *requests,
        **options,
        max_in_flight=in_flight,
        prepare=lambda runner: runner.use_graphs(sizes, [], recorder=FunctionRecorder()),
    )
    assert result.tokens == expected.tokens
    for name, entries in expected.logprobs.items():
        assert [e.top for e in result.logprobs[name]] == [e.top for e in entries]


def test_the_smallest_graph_that_holds_the_rows_is_taken(run_requests, make_request):
    recorder = FunctionRecorder()
    requests = [make_request(f"r{i}", [i, 7], max_tokens=3 + i) for i in range(6)]
    run_requests(*requests, prepare=lambda runner: runner.use_graphs([1, 2, 4], [], recorder=recorder))
    sizes = [len(function.result.tokens_R) for function in recorder.replayed if isinstance(function.result, Sampled)]
    assert sizes == [4, 4, 2, 1]


def test_logits_are_wanted_where_the_draw_reads_them(run_requests, make_request):
    """Of rows with a filter; of all rows beside one with a rule or log probabilities; never of padding."""
    wishes = []

    def listen(model):
        race = model.race_own
        model.race_own = lambda hidden, rows: wishes.append(rows.wants_logits_S.tolist()) or race(hidden, rows)
        return model

    requests = [
        make_request("greedy", [1], max_tokens=7, top_p=0.5),
        make_request("sampled", [2], max_tokens=7, temperature=1.0, top_p=0.9999999999),  # 1 in float32
        make_request("filtered", [3], max_tokens=6, temperature=1.0, top_p=0.9),
        make_request("loud", [4, 5], max_tokens=3, logprobs=0),
    ]
    prepare = lambda runner: runner.use_graphs([6], [], recorder=FunctionRecorder())  # noqa: E731
    run_requests(*requests, max_num_seqs=6, wrap=listen, prepare=prepare)
    assert wishes == [*[[0] * 6] * 2, [1] * 4, *[[1] * 4 + [0] * 2] * 2, *[[0, 0, 1, 0, 0, 0]] * 3, [0] * 6]


def test_sizes_reach_the_largest_batch_and_waste_little():
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    for largest in (8, 64, 100, 256, 1000):
        sizes = graph_sizes(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
        assert all(after - before <= max(8, before / 8) for before, after in pairwise(sizes))


@pytest.mark.parametrize("in_flight", [1, 2], ids=["plain", "overlapped"])
@pytest.mark.parametrize("gpu", [pytest.param(True, marks=ON_GPU)], ids=[""])
def test_graphs_equal_eager(run_requests, requests, in_flight, gpu):
    options = {"device": "cuda", "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_in_flight": in_flight}
    eager = run_requests(*requests, **options, cuda_graphs=False)
    assert run_requests(*requests, **options).tokens == eager.tokens


STREAMING = {"kernel": "streaming", "tile_n": 64, "split_k": 1, "num_stages": 3, "early_start": True}
SKINNY = {"kernel": "skinny", "block_n": 64, "block_k": 64, "split_k": 1, "num_warps": 4, "num_stages": 3, "early_start": True}


@pytest.mark.parametrize("config", [pytest.param(config, marks=ON_GPU, id=config["kernel"]) for config in (STREAMING, SKINNY)])
def test_a_head_that_races_gives_the_text_of_all_logits(run_requests, requests, monkeypatch, config):
    """Greedy, sampled and filtered rows, with and without rows beside them that have rules; the same bits of each logit."""
    raced = []

    def race(x_SK, weight_VK, rows, *, first_token=0, keep=True):
        if not keep:
            rows = replace(rows, wants_logits_S=torch.ones_like(rows.slots_S))
        scores = head_race.race_head_by(x_SK, weight_VK, rows, config, first_token=first_token)
        raced.append(keep)
        return scores if keep else HeadScores(scores.logits_SV)

    monkeypatch.setenv("PILOTFISH_KERNELS", "invariant")
    dispatch.kernel_mode.cache_clear()
    options = {"device": "cuda", "dtype": "bfloat16", "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_in_flight": 2}
    monkeypatch.setattr(embedding, "race_head", partial(race, keep=False))
    expected = run_requests(*requests, **options, cuda_graphs=False)
    monkeypatch.setattr(embedding, "race_head", race)
    result = run_requests(*requests, **options)
    monkeypatch.undo()
    dispatch.kernel_mode.cache_clear()
    assert {True, False} == set(raced)
    assert result.tokens == expected.tokens
