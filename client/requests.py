"""From a caller's Python values to calls, checked here so that mistakes raise before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from ..common.errors import InvalidRequest
from ..common.sampling_params import SamplingParams
from ..proto import common_pb2 as common
from ..proto import inference_pb2 as pb

Messages = str | Sequence[Mapping[str, str]]
Params = SamplingParams | Mapping[str, Any]


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments; only those given are sent."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    bad_words: str | Sequence[str]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    max_tokens: int | None
    ignore_eos: bool
    seed: int | None
    logprobs: int | None
    skip_special_tokens: bool
    include_stop_str_in_output: bool


class CallOptions(SamplingOptions, total=False):
    """What every request for text may say besides its sampling parameters.

    model: the served name; empty for the only one served.
    timeout_s: until the whole answer is here, further attempts included; the server stops working at it too.
    priority: higher is served first.
    request_id: a name of 1 to 128 printable ASCII characters, unique among running requests; empty for a new one.
    """

    model: str
    timeout_s: float | None
    priority: int
    request_id: str


class GenerateOptions(CallOptions, total=False):
    """echo: begin the text with the prompt."""

    echo: bool


class ChatOptions(CallOptions, total=False):
    """continue_final_message: go on with the last message, which must be the assistant's."""

    continue_final_message: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCall:
    """A request for text, ready to send with `method`; its answer has `num_choices` choices."""

    method: str
    request: pb.GenerateRequest | pb.ChatRequest
    num_choices: int
    timeout_s: float | None


def generate_call(prompt: str | Sequence[int], params: Params | None, options: Mapping[str, Any]) -> TextCall:
    """Raises InvalidRequest for an unknown option, a value out of its range, or a prompt that is neither text nor token ids."""
    request, sampling = _split(options, GenerateOptions)
    timeout_s = request.pop("timeout_s", None)
    message, num_choices = _sampling(params, sampling)
    try:
        call = pb.GenerateRequest(sampling=message, **request)
        if isinstance(prompt, str):
            call.text = prompt
        else:
            call.tokens.CopyFrom(pb.TokenIds(ids=tuple(prompt)))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the prompt must be text or token ids, and the options of their types: {error}") from error
    return TextCall(method="Generate", request=call, num_choices=num_choices, timeout_s=timeout_s)


def chat_call(messages: Messages, params: Params | None, options: Mapping[str, Any]) -> TextCall:
    """Raises InvalidRequest for an unknown option, a value out of its range, or malformed messages."""
    request, sampling = _split(options, ChatOptions)
    timeout_s = request.pop("timeout_s", None)
    message, num_choices = _sampling(params, sampling)
    chat = _chat_messages(messages)
    try:
        call = pb.ChatRequest(messages=chat, sampling=message, **request)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"an option has a wrong type: {error}") from error
    return TextCall(method="Chat", request=call, num_choices=num_choices, timeout_s=timeout_s)


def tokenize_request(text: Messages, *, model: str, add_special_tokens: bool) -> pb.TokenizeRequest:
    """Raises InvalidRequest for text that is not valid Unicode or malformed messages."""
    request = pb.TokenizeRequest(model=model, add_special_tokens=add_special_tokens)
    if not isinstance(text, str):
        request.messages.CopyFrom(pb.ChatMessages(messages=_chat_messages(text)))
        return request
    try:
        request.text = text
    except ValueError as error:
        raise InvalidRequest(f"the text is not valid Unicode: {error}") from error
    return request


def _chat_messages(messages: Messages) -> list[pb.ChatMessage]:
    """A string alone is one message of the user."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    result = []
    for index, message in enumerate(messages):
        try:
            result.append(pb.ChatMessage(role=message["role"], content=message["content"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"messages[{index}] must be an object with the strings role and content: {error!r}") from error
    return result


def _split(options: Mapping[str, Any], kind: type[CallOptions]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the call, sampling parameters and whatever is unknown)."""
    names = kind.__annotations__.keys() - SamplingOptions.__annotations__.keys()
    return (
        {name: value for name, value in options.items() if name in names},
        {name: value for name, value in options.items() if name not in names},
    )


def _sampling(params: Params | None, options: Mapping[str, Any]) -> tuple[common.SamplingParams, int]:
    """The message with what the caller set (see `Client`), and the number of choices. `options` win over `params`."""
    if params is not None and not isinstance(params, (SamplingParams, Mapping)):
        raise InvalidRequest(f"params must be SamplingParams or a mapping of its fields, not {params!r}")
    stated = _differing(params) if isinstance(params, SamplingParams) else dict(params or {})
    stated.update(options)
    checked = SamplingParams.from_mapping(stated)
    values = {name: getattr(checked, name) for name in stated}
    return common.SamplingParams(**{name: value for name, value in values.items() if value is not None}), checked.n


def _differing(params: SamplingParams) -> dict[str, Any]:
    default = SamplingParams()
    names = [field.name for field in fields(SamplingParams)]
    return {name: getattr(params, name) for name in names if getattr(params, name) != getattr(default, name)}
