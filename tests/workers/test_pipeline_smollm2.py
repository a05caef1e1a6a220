"""The Pipeline on a real model, where it has been set up (`make test` does)."""

from __future__ import annotations

import pytest
from pilotfish import Pipeline, SamplingParams
from pilotfish.common.requests import FinishReason

MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def pipeline(smollm2_path):
    with Pipeline(MODEL, device="cpu", num_kv_blocks=512, max_num_seqs=32, num_threads=1) as pipeline:
        yield pipeline


def test_a_chat_is_answered_with_the_truth(pipeline):
    question = "What is the capital of France? Explain gravity in one sentence."
    completion = pipeline([{"role": "user", "content": question}], SamplingParams(temperature=0.0, max_tokens=30))
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason is FinishReason.STOP


def test_a_seed_gives_the_same_text_alone_and_in_a_batch_of_32(pipeline):
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8)
    mine = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8, seed=11)
    alone = pipeline("Once upon a time", mine)
    crowd = pipeline([*(f"Write a poem about the number {i}" for i in range(31)), "Once upon a time"], [params] * 31 + [mine])
    assert crowd[-1].token_ids == alone.token_ids
    assert crowd[0].token_ids != alone.token_ids
