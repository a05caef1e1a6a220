"""Between errors and their messages, and rows of `OutputColumns` and `SequenceOutput`s, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..common.errors import PilotfishError, error_from_code
from ..common.requests import FinishReason, SequenceOutput, TokenLogprob
from . import gateway_pb2 as pb
from .codec import finish_reason_from_proto, finish_reason_to_proto, logprob_from_proto, logprob_to_proto


def failure_to_proto(error: PilotfishError) -> pb.Failure:
    return pb.Failure(code=error.code, message=error.message, retry_after_s=error.retry_after_s)


def failure_from_proto(message: pb.Failure) -> PilotfishError:
    retry_after_s = message.retry_after_s if message.HasField("retry_after_s") else None
    return error_from_code(message.code, message.message, retry_after_s=retry_after_s)


@dataclass(frozen=True, slots=True)
class ChoiceRun:
    """Where a choice runs; `queue_ms` is its request's, from its arrival."""

    replica: str
    num_attempts: int
    cached_tokens: int
    queue_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of choice `choice` of the stream of that number."""

    number: int
    choice: int
    output: SequenceOutput
    run: ChoiceRun | None = None


def add_row(
    columns: pb.OutputColumns,
    number: int,
    choice: int,
    *,
    offset: int,
    token_ids: Sequence[int],
    finish_reason: FinishReason | None,
    logprobs: Sequence[TokenLogprob] = (),
    run: ChoiceRun | None = None,
) -> None:
    """`logprobs` are of all tokens, or of none."""
    if logprobs or run is not None:
        detail = columns.details.add(row=len(columns.numbers), logprobs=map(logprob_to_proto, logprobs))
        if run is not None:
            detail.run.replica, detail.run.num_attempts = run.replica, run.num_attempts
            detail.run.cached_tokens, detail.run.queue_ms = run.cached_tokens, run.queue_ms
    columns.numbers.append(number)
    columns.choices.append(choice)
    columns.offsets.append(offset)
    columns.num_tokens.append(len(token_ids))
    columns.token_ids.extend(token_ids)
    columns.finish_reasons.append(finish_reason_to_proto(finish_reason))


def rows(columns: pb.OutputColumns) -> Iterator[Row]:
    """In order."""
    details = {detail.row: detail for detail in columns.details}
    token_ids, start = list(columns.token_ids), 0
    heads = zip(columns.numbers, columns.choices, columns.offsets, columns.num_tokens, columns.finish_reasons, strict=True)
    for index, (number, choice, offset, num_tokens, reason) in enumerate(heads):
        detail = details.get(index)
        run = detail.run if detail is not None and detail.HasField("run") else None
        output = SequenceOutput(
            request_id="",
            offset=offset,
            token_ids=tuple(token_ids[start : start + num_tokens]),
            logprobs=() if detail is None else tuple(map(logprob_from_proto, detail.logprobs)),
            finish_reason=finish_reason_from_proto(reason),
            cached_tokens=run.cached_tokens if run else 0,
        )
        start += num_tokens
        yield Row(
            number,
            choice,
            output,
            ChoiceRun(run.replica, run.num_attempts, run.cached_tokens, run.queue_ms) if run else None,
        )
