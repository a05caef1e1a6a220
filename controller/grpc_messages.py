"""Between inference.proto and the controller's values.

A request is parsed strictly: bytes that are no such message, text that is not UTF-8, or a field that this server does not
know (a newer client's) is an InvalidRequest, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NoReturn, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from .. import __version__
from ..common.errors import InvalidRequest
from ..common.requests import TokenLogprob
from ..common.sampling_params import MAX_CHOICES
from ..proto import codec
from ..proto import common_pb2 as common
from ..proto import inference_pb2 as pb
from ..text.prepare import MAX_MESSAGES
from ..text.tokenizer import Tokenizer
from .events import Delta, Event, Started, Usage
from .sequence_state import Received

M = TypeVar("M", bound=Message)
_MAX_PARTS_SEARCHED = 10_000


def parse(cls: type[M], data: bytes) -> M:
    """The message in `data`.

    Raises:
        InvalidRequest: not such a message, not UTF-8, or an unknown field anywhere in it.
    """
    try:
        message = cls.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the request is not a valid {cls.DESCRIPTOR.name}; strings must be UTF-8 ({error})") from error
    size = message.ByteSize()
    message.DiscardUnknownFields()
    if message.ByteSize() != size:
        _refuse_unknown(cls.FromString(data))
    return message


def sampling_fields(message: common.SamplingParams) -> dict[str, Any]:
    """The fields that the client set, by name."""
    fields: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        if isinstance(value, Mapping):
            fields[descriptor.name] = dict(value)
        elif descriptor.is_repeated:
            fields[descriptor.name] = tuple(value)
        else:
            fields[descriptor.name] = value
    return fields


def messages_from_proto(messages: Any) -> list[dict[str, str]]:
    """Raises InvalidRequest: there are too many."""
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"{len(messages)} messages; at most {MAX_MESSAGES} are allowed in a conversation")
    return [{"role": message.role, "content": message.content} for message in messages]


def events_to_proto(events: Sequence[Event], tokenizer: Tokenizer) -> pb.GenerateEvents:
    """Of one request, as they come from its stream: in the message's order."""
    message = pb.GenerateEvents()
    for event in events:
        if isinstance(event, Delta):
            _add_delta(message, event, tokenizer)
        elif isinstance(event, Started):
            started = message.started
            started.request_id, started.model = event.request_id, event.model
            started.created_unix_s, started.prompt_tokens = event.created_unix_s, event.prompt_tokens
        else:
            _set_usage(message.usage, event)
    return message


def _add_delta(message: pb.GenerateEvents, event: Delta, tokenizer: Tokenizer) -> None:
    """Filled in place, and only with what there is: there is one a token."""
    content = event.content
    delta = message.deltas.add(offset=content.offset, token_ids=content.token_ids, text=content.text)
    if event.index:
        delta.index = event.index
    if content.logprobs:
        delta.logprobs.extend(_logprob_to_proto(entry, tokenizer) for entry in content.logprobs)
    if content.finish_reason is not None:
        delta.finish_reason = codec.finish_reason_to_proto(content.finish_reason)
        delta.stop_reason = content.stop_reason


def _logprob_to_proto(entry: TokenLogprob, tokenizer: Tokenizer) -> common.TokenLogprob:
    message = codec.logprob_to_proto(entry)
    message.token = tokenizer.token_bytes(entry.token_id)
    for top in message.top:
        top.token = tokenizer.token_bytes(top.token_id)
    return message


def _set_usage(message: pb.Usage, usage: Usage) -> None:
    message.SetInParent()
    message.prompt_tokens = usage.prompt_tokens
    message.completion_tokens = usage.completion_tokens
    message.cached_tokens = usage.cached_tokens
    message.queue_ms = usage.queue_ms
    message.ttft_ms = usage.ttft_ms
    message.total_ms = usage.total_ms
    message.replica = usage.replica


def received_from_proto(choices: Any) -> list[Received]:
    """Raises InvalidRequest: there are too many."""
    if len(choices) > MAX_CHOICES:
        raise InvalidRequest(f"{len(choices)} choices; a request has at most {MAX_CHOICES}")
    return [Received(tuple(choice.token_ids), choice.num_chars) for choice in choices]


def _refuse_unknown(message: Message) -> NoReturn:
    """For a message that has an unknown field somewhere."""
    what, advice = "the request has an unknown field", f"this server is pilotfish {__version__}: use a client of this version"
    for part in islice(_parts(message), _MAX_PARTS_SEARCHED):
        for field in UnknownFieldSet(part):
            what = f"{part.DESCRIPTOR.name} has the unknown field number {field.field_number}"
            raise InvalidRequest(f"{what}; {advice}")
    raise InvalidRequest(f"{what}; {advice}")


def _parts(message: Message) -> Iterator[Message]:
    """The message and all those in it."""
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        for part in value if descriptor.is_repeated else (value,):
            yield from _parts(part)
