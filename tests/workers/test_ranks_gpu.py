"""Two GPUs say what one says, through CUDA graphs and without, and a rank that is lost ends its replica.

Logits of two runs differ by rounding, so greedy texts may part where two tokens are almost equally likely, and nowhere else.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from bench_process import BenchProcess, has_ended
from pilotfish.common.config import EngineConfig, ModelConfig, ParallelConfig
from pilotfish.common.requests import EngineRequest, StepOutput, TokenLogprob, TokenSampling
from pilotfish.workers.engine import Engine
from pilotfish.workers.local_replica import LocalReplica

pytestmark = [pytest.mark.gpu2, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "norm_topk_prob": True}
NUM_PROMPTS, MAX_TOKENS = 8, 24
TIE = {"float32": 1e-3, "bfloat16": 0.2}  # two tokens whose log probabilities are closer may change places
GREEDY = [{"temperature": 0.0}] * NUM_PROMPTS
LOUD = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "logprobs": 2, "logit_bias": {5: 1.0}, "max_tokens": 9}
MIXED = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 20, "max_tokens": 16}, LOUD] * 2
WHOLE_EXPERTS, SLICES = {"tensor_parallel": 2, "expert_parallel": True}, {"tensor_parallel": 2}
DATA_RANKS = {"data_parallel": 2, "expert_parallel": True}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights in bfloat16."""
    paths = {}
    for name, family, config in (("dense", "Qwen3", SHAPE), ("sparse", "Qwen3Moe", SHAPE | EXPERTS)):
        torch.manual_seed(1)
        model = getattr(transformers, f"{family}ForCausalLM")(
            getattr(transformers, f"{family}Config")(**config, initializer_range=0.05)
        )
        paths[name] = tmp_path_factory.mktemp(name)
        model.to(torch.bfloat16).save_pretrained(paths[name])
    return paths


class Texts:
    """What an engine tells, by request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprob]] = {}
        self._num_ended = 0
        self._changed = threading.Condition()

    def __call__(self, step: StepOutput) -> None:
        with self._changed:
            for sequence in step.sequences:
                assert not sequence.error, sequence.error
                self.tokens.setdefault(sequence.request_id, []).extend(sequence.token_ids)
                self.logprobs.setdefault(sequence.request_id, []).extend(sequence.logprobs or ())
                self._num_ended += sequence.finish_reason is not None
            self._changed.notify_all()

    def wait_for_ends(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_ended == number, 120), self.tokens


def generate(
    model: Path,
    samplings: Sequence[dict],
    *,
    dtype: str,
    parallel: dict | None = None,
    logprobs: int | None = None,
    **engine_options: object,
) -> Texts:
    texts = Texts()
    config = EngineConfig(**{"device": "cuda", "num_kv_blocks": 128, "max_num_seqs": NUM_PROMPTS, **engine_options})
    set_up = LocalReplica(ParallelConfig(**parallel), on_step=lambda rank, step: texts(step)) if parallel else None
    engine = Engine(ModelConfig(model=str(model), dtype=dtype), config, on_step=texts, set_up=set_up)
    try:
        engine.start()
        engines = [engine, *(set_up.leaders if set_up else ())]
        for index, sampling in enumerate(samplings):
            values = {"max_tokens": MAX_TOKENS, "seed": index, "logprobs": logprobs, **sampling}
            prompt = tuple(range(7 * index, 7 * index + 5 + 9 * index))
            request = EngineRequest(request_id=f"r{index}", prompt_token_ids=prompt, sampling=TokenSampling(**values))
            engines[index % len(engines)].submit(request)
        texts.wait_for_ends(len(samplings))
    finally:
        engine.stop()
    return texts


def assert_agree(texts: Texts, expected: Texts, dtype: str) -> None:
    """`expected` has two log probabilities a token."""
    num_same = 0
    for name, tokens in expected.tokens.items():
        for index, (token, ours) in enumerate(zip(tokens, texts.tokens[name], strict=True)):
            if token != ours:
                (_, best), (_, second) = expected.logprobs[name][index].top
                assert best - second < TIE[dtype], f"{name} parts at {index}, where nothing ties"
                break
            num_same += 1
    assert num_same > NUM_PROMPTS * MAX_TOKENS / 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "parallel"),
    [("dense", SLICES), ("sparse", SLICES), ("sparse", WHOLE_EXPERTS), ("sparse", DATA_RANKS)],
)
def test_two_gpus_say_what_one_says(checkpoints: dict[str, Path], kind: str, parallel: dict, dtype: str) -> None:
    one = generate(checkpoints[kind], GREEDY, dtype=dtype, logprobs=2)
    for options in ({}, {"cuda_graphs": False}, {"num_kv_blocks": None, "kv_memory_fraction": 0.1}):
        assert_agree(generate(checkpoints[kind], GREEDY, dtype=dtype, parallel=parallel, **options), one, dtype)


@pytest.mark.parametrize(("kind", "parallel"), [("dense", SLICES), ("sparse", SLICES), ("sparse", DATA_RANKS)])
def test_plain_and_loud_draws_in_one_batch(checkpoints: dict[str, Path], kind: str, parallel: dict) -> None:
    """Of some steps all ranks draw, of others the leader alone; through graphs and outside of them."""
    one = generate(checkpoints[kind], MIXED, dtype="float32")
    for cuda_graphs in (True, False):
        two = generate(checkpoints[kind], MIXED, dtype="float32", parallel=parallel, cuda_graphs=cuda_graphs)
        assert two.tokens == one.tokens


LONG = ("--shape", "qwen3-0.6b", "--batch-sizes", "8", "--input-len", "16", "--output-len", "8000", "--max-num-seqs", "8")


def test_a_follower_that_dies_ends_the_leader() -> None:
    with BenchProcess(*LONG) as bench:
        os.kill(bench.follower, signal.SIGKILL)
        assert bench.wait(15) == 1
        assert "pilotfish bench: the engine is failed: rank 1's process ended (exit code -9)" in bench.said


def test_a_follower_that_is_stopped_ends_the_leader() -> None:
    with BenchProcess(*LONG) as bench:
        follower = bench.follower
        os.kill(follower, signal.SIGSTOP)
        assert bench.wait(20) == 1
        assert "rank 1 on 127.0.0.1 has been silent for" in bench.said
        assert has_ended(follower, timeout_s=5)


def test_interrupted_all_ranks_end() -> None:
    with BenchProcess(*LONG) as bench:
        follower = bench.follower
        bench.interrupt()
        assert bench.wait(20) == 130
        assert has_ended(follower, timeout_s=5)
