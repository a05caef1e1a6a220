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
_SAMPLING_SCALARS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "max_tokens", "seed"),
)
_INFO_FIELDS = tuple(name for name in WorkerInfo.__dataclass_fields__ if name != "kernels")


def finish_reason_to_proto(reason: FinishReason | None) -> common_pb2.FinishReason:
    return _FINISH_TO_PROTO[reason]


def finish_reason_from_proto(value: int) -> FinishReason | None:
    return _FINISH_FROM_PROTO[value]


def request_to_proto(request: EngineRequest) -> worker_pb2.Submit:
    message = worker_pb2.Submit()
    fill_request(message, request)
    return message


def fill_request(message: worker_pb2.Submit, request: EngineRequest) -> None:
    """`message` is empty: what is 0 need not be said."""
    message.request_id, message.priority, message.salt = request.request_id, request.priority, request.salt
    message.prompt_token_ids.extend(request.prompt_token_ids)
    message.output_token_ids.extend(request.output_token_ids)
    if request.deadline_ms is not None:
        message.deadline_ms = request.deadline_ms
    message.tenant, message.tenant_weight = request.tenant.name, request.tenant.weight
    sampling, params = request.sampling, message.sampling
    params.SetInParent()
    for name in _SAMPLING_SCALARS:
        if value := getattr(sampling, name):
            setattr(params, name, value)
    if sampling.logprobs is not None:
        params.logprobs = sampling.logprobs
    params.end_token_ids.extend(sampling.end_token_ids)
    params.logit_bias.update(sampling.logit_bias)
    for ids in sampling.bad_words_ids:
        params.bad_words.add(token_ids=ids)


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
    message = worker_pb2.Step()
    fill_step(message, step)
    return message


def fill_step(message: worker_pb2.Step, step: StepOutput) -> None:
    """`message` is empty; a part of another one is filled in place for half of what copying it there costs."""
    message.step_id = step.step_id
    message.num_batched_tokens = step.num_batched_tokens
    columns, sequences = message.sequences, step.sequences
    columns.request_ids.extend([sequence.request_id for sequence in sequences])
    columns.offsets.extend([sequence.offset for sequence in sequences])
    columns.num_tokens.extend([len(sequence.token_ids) for sequence in sequences])
    columns.token_ids.extend([token_id for sequence in sequences for token_id in sequence.token_ids])
    columns.finish_reasons.extend([_FINISH_TO_PROTO[sequence.finish_reason] for sequence in sequences])
    for index, sequence in enumerate(sequences):
        if sequence.cached_tokens or sequence.error or sequence.logprobs:
            columns.details.add(
                sequence=index,
                cached_tokens=sequence.cached_tokens,
                error=sequence.error,
                logprobs=[logprob_to_proto(entry) for entry in sequence.logprobs],
            )
    _fill_events(message.kv_events, step.first_event_id, step.kv_events)
    timings = message.timings
    timings.plan_ms, timings.forward_ms = step.timings.plan_ms, step.timings.forward_ms
    timings.sample_ms, timings.total_ms = step.timings.sample_ms, step.timings.total_ms
    fill_load(message.load, step.load)


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
    message = common_pb2.EngineLoad()
    fill_load(message, load)
    return message


def fill_load(message: common_pb2.EngineLoad, load: EngineLoad) -> None:
    """`message` is empty."""
    for name in _LOAD_FIELDS:
        setattr(message, name, getattr(load, name))
    if load.expert_balance is not None:
        values = {name: getattr(load.expert_balance, name) for name in _BALANCE_FIELDS}
        message.expert_balance.CopyFrom(common_pb2.ExpertBalance(**values))


def load_from_proto(message: common_pb2.EngineLoad) -> EngineLoad:
    balance = None
    if message.HasField("expert_balance"):
        balance = ExpertBalance(**{name: getattr(message.expert_balance, name) for name in _BALANCE_FIELDS})
    return EngineLoad(expert_balance=balance, **{name: getattr(message, name) for name in _LOAD_FIELDS})


def info_to_proto(info: WorkerInfo) -> common_pb2.WorkerInfo:
    return common_pb2.WorkerInfo(kernels=info.kernels, **{name: getattr(info, name) for name in _INFO_FIELDS})


def info_from_proto(message: common_pb2.WorkerInfo) -> WorkerInfo:
    return WorkerInfo(kernels=dict(message.kernels), **{name: getattr(message, name) for name in _INFO_FIELDS})


def _fill_events(message: worker_pb2.KvEvents, first_id: int, events: Sequence[KvEvent]) -> None:
    message.first_id = first_id
    message.stored.extend([isinstance(event, BlockStored) for event in events])
    message.block_hashes.extend([event.block_hash for event in events])
    message.parent_hashes.extend([event.parent_hash if isinstance(event, BlockStored) else b"" for event in events])


def _events_from_proto(message: worker_pb2.KvEvents) -> tuple[KvEvent, ...]:
    return tuple(
        BlockStored(block_hash, parent_hash) if stored else BlockRemoved(block_hash)
        for block_hash, parent_hash, stored in zip(message.block_hashes, message.parent_hashes, message.stored, strict=True)
    )
