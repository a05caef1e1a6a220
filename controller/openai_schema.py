"""Bodies of the OpenAI-style routes: what may be asked, and what is refused by name.

pydantic checks names and types; ranges are checked where every path meets, in common/sampling_params.py. A field that is not
obeyed is refused, never ignored. The first mistake ends the check, and lists have bounds: a body of some megabytes can hold a
million mistakes, and all others would wait until the last of them was found.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from ..common.errors import InvalidRequest
from ..common.sampling_params import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_NAME_LENGTH, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS
from ..text.prepare import MAX_MESSAGES

_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "bad_words",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "seed",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
_NOT_YET = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "response_format",
    "audio",
    "modalities",
    "prediction",
    "reasoning_effort",
    "store",
    "web_search_options",
    "service_tier",
    "verbosity",
    "suffix",
    "best_of",
    "prompt_logprobs",
)
MAX_PROMPTS = 128
Number = StrictFloat | StrictInt
R = TypeVar("R", bound="RequestBody")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values:
                if name not in cls.model_fields:
                    raise ValueError(_unknown(name, list(cls.model_fields)))
        return values


class StreamOptions(_Strict):
    include_usage: StrictBool = False


class RequestBody(_Strict):
    """Fields of both routes. `user` is written to the log beside the request id; `timeout_s`, `priority`, `request_id` and the
    sampling parameters that OpenAI does not have are pilotfish's own."""

    model: StrictStr = ""
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    request_id: StrictStr | None = None
    priority: StrictInt = 0
    timeout_s: Number | None = None
    n: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    bad_words: StrictStr | Annotated[list[StrictStr], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[StrictInt], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None = None
    min_tokens: StrictInt | None = None
    max_tokens: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    seed: StrictInt | None = None
    skip_special_tokens: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _bias_is_short(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"{len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed")
        return value

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> RequestBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream: true")
        return self

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the caller set; a JSON null is as if it were not there."""
        return {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}


class TextPart(_Strict):
    type: Literal["text"]
    text: StrictStr


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_MESSAGES)]
    name: StrictStr | None = None

    def for_template(self) -> dict[str, str]:
        """What a chat template sees; OpenAI's `developer` is the newer name of `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


class ChatBody(RequestBody):
    messages: Annotated[list[Message], Field(fail_fast=True, max_length=MAX_MESSAGES)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    continue_final_message: StrictBool = False

    def sampling(self) -> dict[str, Any]:
        fields = super().sampling()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest("set max_completion_tokens or the older max_tokens, not both")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit is not None:
            fields["max_tokens"] = limit
        if self.logprobs:
            fields["logprobs"] = self.top_logprobs or 0
        elif self.top_logprobs is not None:
            raise InvalidRequest("top_logprobs needs logprobs: true")
        return fields


class CompletionBody(RequestBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: StrictBool = False
    logprobs: StrictInt | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _is_prompt(cls, value: Any) -> Any:
        """By hand: token ids come by the million, and pydantic would try all four forms on each."""
        kinds = set(map(type, value)) if isinstance(value, list) else {type(value)}
        if isinstance(value, list) and kinds in ({str}, {list}) and len(value) > MAX_PROMPTS:
            raise ValueError(f"{len(value)} prompts in one call; at most {MAX_PROMPTS} are allowed")
        if kinds == {str} or (isinstance(value, list) and kinds <= {int}):
            return value
        if kinds == {list} and all(set(map(type, item)) <= {int} for item in value):
            return value
        raise ValueError("give a text, a list of token ids, or a list of either")

    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]  # type: ignore[list-item]
        if not prompt:
            raise InvalidRequest("prompt is empty; give a text, a list of token ids, or a list of them")
        return list(prompt)  # type: ignore[arg-type]

    def sampling(self) -> dict[str, Any]:
        """As OpenAI documents for this route, at most 16 tokens where nothing is said."""
        fields = super().sampling()
        fields["max_tokens"] = 16 if self.max_tokens is None else self.max_tokens
        if self.logprobs is not None:
            fields["logprobs"] = self.logprobs
        return fields


def parse_body(cls: type[R], data: bytes) -> R:
    """The request in a JSON body.

    Raises:
        InvalidRequest: not UTF-8, not a JSON object, a field that is missing, unknown (with the nearest name), not
            supported, or of the wrong type.
    """
    try:
        values = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        message = str(error).partition("; use sys.")[0]  # Python's advice on numbers of thousands of digits is for the server
        raise InvalidRequest(f"the body is not valid JSON: {message}") from error
    if not isinstance(values, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise InvalidRequest(_explain(error)) from error


def _unknown(name: str, known: list[str]) -> str:
    if name in _NOT_YET:
        return f"{name!r} is not supported by this server"
    near = difflib.get_close_matches(name[:MAX_NAME_LENGTH], known, n=1)
    return f"unknown field {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def _explain(error: ValidationError) -> str:
    """The first complaint; for a field with several allowed types, of all of them."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]["loc"][:1]
    same = [problem for problem in problems if problem["loc"][:1] == first]
    if not first:
        return str(same[0]["msg"]).removeprefix(_BY_HAND)
    place = ".".join(str(step) for step in same[0]["loc"] if not (isinstance(step, str) and ("[" in step or step in _TYPES)))
    return f"{place}: " + "; or ".join(dict.fromkeys(str(problem["msg"]).removeprefix(_BY_HAND) for problem in same))


_BY_HAND = "Value error, "  # pydantic's words before those of a ValueError
_TYPES = ("str", "int", "float", "bool")  # pydantic adds the tried type to a union's location
