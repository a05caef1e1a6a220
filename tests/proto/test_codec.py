import random

import pytest
from pilotfish.common.requests import (
    BlockRemoved,
    BlockStored,
    EngineLoad,
    EngineRequest,
    ExpertBalance,
    FinishReason,
    SequenceOutput,
    StepOutput,
    StepTimings,
    TokenLogprob,
    TokenSampling,
    WorkerInfo,
)
from pilotfish.common.tenants import Tenant
from pilotfish.proto import codec, common_pb2, worker_pb2

SAMPLING = TokenSampling(
    temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, presence_penalty=-1.5, frequency_penalty=2.0,
    logit_bias={3: -100.0, 9: 1.5}, bad_words_ids=((1, 2), (3,)), end_token_ids=(2, 7), min_tokens=3, max_tokens=99,
    seed=-(2**63), logprobs=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "request_",
    [
        EngineRequest(request_id="a", prompt_token_ids=(1, 2, 3), sampling=SAMPLING),
        EngineRequest(
            request_id="b#1", prompt_token_ids=(5,), sampling=TokenSampling(temperature=0, max_tokens=1, seed=0),
            output_token_ids=(8, 9), priority=-3, deadline_ms=12.5, salt=b"\x00s", tenant=Tenant("acme", 2.5),
        ),
    ],
)  # fmt: skip
def test_a_request_survives(request_) -> None:
    data = codec.request_to_proto(request_).SerializeToString()
    assert codec.request_from_proto(worker_pb2.Submit.FromString(data)) == request_


BALANCE = ExpertBalance(measured=1.5, expected=1.1, num_moves=9, last_step_id=8)


def random_step(rng: random.Random) -> StepOutput:
    def output(i: int) -> SequenceOutput:
        tokens = tuple(rng.randrange(50000) for _ in range(rng.choice([0, 1, 1, 4])))
        with_logprobs = rng.random() < 0.5
        logprobs = tuple(TokenLogprob(t, -0.5 * t, 2, ((t, -0.25), (4, -8.0))) for t in tokens) if with_logprobs else ()
        return SequenceOutput(
            request_id=f"r{i}", offset=rng.randrange(1000), token_ids=tokens, logprobs=logprobs,
            finish_reason=rng.choice([None, *FinishReason]), cached_tokens=rng.choice([0, 32]), error=rng.choice(["", "boom"]),
        )  # fmt: skip

    events = tuple(
        BlockStored(rng.randbytes(16), rng.randbytes(16)) if rng.random() < 0.6 else BlockRemoved(rng.randbytes(16))
        for _ in range(rng.randrange(5))
    )
    return StepOutput(
        step_id=rng.randrange(2**40), sequences=tuple(output(i) for i in range(rng.randrange(6))),
        first_event_id=rng.randrange(99),
        kv_events=events, num_batched_tokens=7, timings=StepTimings(plan_ms=0.1, forward_ms=2, sample_ms=3, total_ms=5.5),
        load=EngineLoad(num_running=1, num_waiting=2, num_free_blocks=3, num_cached_blocks=4, num_used_blocks=5,
                        queued_tokens=6, num_preemptions=7, expert_balance=rng.choice([None, BALANCE])),
    )  # fmt: skip


def test_random_steps_survive() -> None:
    rng = random.Random(7)
    for _ in range(200):
        step = random_step(rng)
        assert codec.step_from_proto(worker_pb2.Step.FromString(codec.step_to_proto(step).SerializeToString())) == step


def test_worker_info_survives() -> None:
    info = WorkerInfo(
        model_name="m", model_path="/m", architecture="LlamaForCausalLM", device="cpu", dtype="float32", vocab_size=9,
        max_model_len=8, block_size=16, num_blocks=7, max_num_seqs=6, max_num_batched_tokens=64, num_parameters=2**40,
        weight_bytes=2**41, kv_cache_bytes=2**39, load_seconds=1.5, kernels={"cpu": "c++"}, epoch=3, pid=4, num_ranks=2,
    )  # fmt: skip
    message = common_pb2.WorkerInfo.FromString(codec.info_to_proto(info).SerializeToString())
    assert codec.info_from_proto(message) == info
