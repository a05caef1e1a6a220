"""Between the values of common/ and the messages of worker.proto, both ways.

A decoded value equals the encoded one (floats that travel as float32 excepted: logprobs).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..common.requests import (
    BlockRemoved,
    BlockStored,
    EngineLoad,
    EngineRequest,
    ExpertBalance,
    FinishReason,
    KvEvent,
    SequenceOutput,
    StepOutput,
    StepTimings,
    TokenLogprob,
    TokenSampling,
    WorkerInfo,
)
from ..common.tenants import ANONYMOUS, Tenant
from . import common_pb2, worker_pb2

_FINISH_TO_PROTO: dict[FinishReason | None, common_pb2.FinishReason] = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_FINISH_FROM_PROTO = {int(value): reason for reason, value in _FINISH_TO_PROTO.items()}
_LOAD_FIELDS = tuple(name for name in EngineLoad.__dataclass_fields__ if name != "expert_balance")
_BALANCE_FIELDS = tuple(ExpertBalance.__dataclass_fields__)
_INFO_FIELDS = tuple(name for name in WorkerInfo.__dataclass_fields__ if name != "kernels")


def finish_reason_to_proto(reason: FinishReason | None) -> common_pb2.FinishReason:
    return _FINISH_TO_PROTO[reason]


def finish_reason_from_proto(value: int) -> FinishReason | None:
    return _FINISH_FROM_PROTO[value]


def request_to_proto(request: EngineRequest) -> worker_pb2.Submit:
    sampling = request.sampling
    return worker_pb2.Submit(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        sampling=worker_pb2.TokenSampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=sampling.logit_bias,
            bad_words=[worker_pb2.BadWord(token_ids=ids) for ids in sampling.bad_words_ids],
            end_token_ids=sampling.end_token_ids,
            min_tokens=sampling.min_tokens,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
        ),
        priority=request.priority,
        deadline_ms=request.deadline_ms,
        salt=request.salt,
        tenant=request.tenant.name,
        tenant_weight=request.tenant.weight,
    )


def request_from_proto(message: worker_pb2.Submit) -> EngineRequest:
    sampling = message.sampling
    return EngineRequest(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=TokenSampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias),
            bad_words_ids=tuple(tuple(word.token_ids) for word in sampling.bad_words),
            end_token_ids=tuple(sampling.end_token_ids),
            min_tokens=sampling.min_tokens,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        ),
        priority=message.priority,
        deadline_ms=message.deadline_ms if message.HasField("deadline_ms") else None,
        salt=message.salt,
        tenant=Tenant(message.tenant, message.tenant_weight or 1.0) if message.tenant else ANONYMOUS,
    )


def step_to_proto(step: StepOutput) -> worker_pb2.Step:
    columns = worker_pb2.SequenceColumns()
    for index, sequence in enumerate(step.sequences):
        columns.request_ids.append(sequence.request_id)
        columns.offsets.append(sequence.offset)
        columns.num_tokens.append(len(sequence.token_ids))
        columns.token_ids.extend(sequence.token_ids)
        columns.finish_reasons.append(_FINISH_TO_PROTO[sequence.finish_reason])
        if sequence.cached_tokens or sequence.error or sequence.logprobs:
            columns.details.add(
                sequence=index,
                cached_tokens=sequence.cached_tokens,
                error=sequence.error,
                logprobs=[logprob_to_proto(entry) for entry in sequence.logprobs],
            )
    timings = step.timings
    return worker_pb2.Step(
        step_id=step.step_id,
        sequences=columns,
        kv_events=_events_to_proto(step.first_event_id, step.kv_events),
        num_batched_tokens=step.num_batched_tokens,
        timings=worker_pb2.StepTimings(
            plan_ms=timings.plan_ms,
            forward_ms=timings.forward_ms,
            sample_ms=timings.sample_ms,
            total_ms=timings.total_ms,
        ),
        load=load_to_proto(step.load),
    )


def step_from_proto(message: worker_pb2.Step) -> StepOutput:
    columns = message.sequences
    token_ids = list(columns.token_ids)
    sequences = []
    start = 0
    for request_id, offset, num_tokens, finish_reason in zip(
        columns.request_ids, columns.offsets, columns.num_tokens, columns.finish_reasons, strict=True
    ):
        end = start + num_tokens
        sequences.append(
            SequenceOutput(
                request_id=request_id,
                offset=offset,
                token_ids=tuple(token_ids[start:end]),
                finish_reason=_FINISH_FROM_PROTO[finish_reason],
            )
        )
        start = end
    for detail in columns.details:
        sequence = sequences[detail.sequence]
        sequence.logprobs = tuple(logprob_from_proto(entry) for entry in detail.logprobs)
        sequence.cached_tokens = detail.cached_tokens
        sequence.error = detail.error
    timings = message.timings
    return StepOutput(
        step_id=message.step_id,
        sequences=tuple(sequences),
        first_event_id=message.kv_events.first_id,
        kv_events=_events_from_proto(message.kv_events),
        num_batched_tokens=message.num_batched_tokens,
        timings=StepTimings(
            plan_ms=timings.plan_ms,
            forward_ms=timings.forward_ms,
            sample_ms=timings.sample_ms,
            total_ms=timings.total_ms,
        ),
        load=load_from_proto(message.load),
    )


def logprob_to_proto(entry: TokenLogprob) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top=[common_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
    )


def logprob_from_proto(message: common_pb2.TokenLogprob) -> TokenLogprob:
    top = tuple((entry.token_id, entry.logprob) for entry in message.top)
    return TokenLogprob(message.token_id, message.logprob, message.rank, top)


def load_to_proto(load: EngineLoad) -> common_pb2.EngineLoad:
    message = common_pb2.EngineLoad(**{name: getattr(load, name) for name in _LOAD_FIELDS})
    if load.expert_balance is not None:
        values = {name: getattr(load.expert_balance, name) for name in _BALANCE_FIELDS}
        message.expert_balance.CopyFrom(common_pb2.ExpertBalance(**values))
    return message


def load_from_proto(message: common_pb2.EngineLoad) -> EngineLoad:
    balance = None
    if message.HasField("expert_balance"):
        balance = ExpertBalance(**{name: getattr(message.expert_balance, name) for name in _BALANCE_FIELDS})
    return EngineLoad(expert_balance=balance, **{name: getattr(message, name) for name in _LOAD_FIELDS})


def info_to_proto(info: WorkerInfo) -> common_pb2.WorkerInfo:
    return common_pb2.WorkerInfo(kernels=info.kernels, **{name: getattr(info, name) for name in _INFO_FIELDS})


def info_from_proto(message: common_pb2.WorkerInfo) -> WorkerInfo:
    return WorkerInfo(kernels=dict(message.kernels), **{name: getattr(message, name) for name in _INFO_FIELDS})


def _events_to_proto(first_id: int, events: Sequence[KvEvent]) -> worker_pb2.KvEvents:
    message = worker_pb2.KvEvents(first_id=first_id)
    for event in events:
        stored = isinstance(event, BlockStored)
        message.stored.append(stored)
        message.block_hashes.append(event.block_hash)
        message.parent_hashes.append(event.parent_hash if isinstance(event, BlockStored) else b"")
    return message


def _events_from_proto(message: worker_pb2.KvEvents) -> tuple[KvEvent, ...]:
    return tuple(
        BlockStored(block_hash, parent_hash) if stored else BlockRemoved(block_hash)
        for block_hash, parent_hash, stored in zip(message.block_hashes, message.parent_hashes, message.stored, strict=True)
    )
