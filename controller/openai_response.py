"""Events of requests to the JSON of the OpenAI-style routes, whole or as server-sent chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import PilotfishError, clipped, status_row
from ..common.requests import FinishReason, TokenLogprob
from ..text.output import TextDelta
from ..text.tokenizer import Tokenizer
from .events import Usage


@dataclass
class Choice:
    """One choice as it grows, for a whole response."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str = ""

    def add(self, delta: TextDelta) -> None:
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason or self.stop_reason

    def as_delta(self) -> TextDelta:
        return TextDelta(
            text="".join(self.text),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class ResponseWriter:
    """Writes one response's JSON. `kind` is "chat" or "completion"; `with_logprobs` says whether they were asked for."""

    def __init__(
        self, *, kind: str, request_id: str, model: str, created_unix_s: int, tokenizer: Tokenizer, with_logprobs: bool
    ) -> None:
        self._chat = kind == "chat"
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._text_offsets: dict[int, int] = {}
        self._base = {"id": request_id, "created": created_unix_s, "model": model}

    def whole(self, choices: Iterable[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._base,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [self._choice(choice.index, choice.as_delta(), whole=True) for choice in choices],
            "usage": usage,
        }

    def chunk(self, index: int, delta: TextDelta, *, first: bool = False) -> dict[str, Any]:
        """One chunk with one choice; the first of a chat choice says who speaks."""
        choice = self._choice(index, delta, whole=False)
        if self._chat and first:
            choice["delta"] = {"role": "assistant", **choice["delta"]}
        return {**self._base, "object": self._chunk_object, "choices": [choice]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._base, "object": self._chunk_object, "choices": [], "usage": usage}

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _choice(self, index: int, delta: TextDelta, *, whole: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": delta.finish_reason, "logprobs": None}
        if delta.stop_reason:
            choice["stop_reason"] = delta.stop_reason
        if self._with_logprobs:
            choice["logprobs"] = (
                {"content": [self._chat_logprob(entry) for entry in delta.logprobs]}
                if self._chat
                else self._completion_logprobs(index, delta)
            )
        if not self._chat:
            choice["text"] = delta.text
        elif whole:
            choice["message"] = {"role": "assistant", "content": delta.text}
        else:
            choice["delta"] = {"content": delta.text} if delta.text else {}
        return choice

    def _chat_logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        return {
            **self._token(entry.token_id, entry.logprob),
            "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    def _completion_logprobs(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """The older shape: parallel lists, and a dictionary of alternatives a token. Offsets count characters of the choice."""
        offset = self._text_offsets.get(index, 0)
        columns: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in delta.logprobs:
            text = self._text(entry.token_id)
            columns["tokens"].append(text)
            columns["token_logprobs"].append(entry.logprob)
            columns["top_logprobs"].append({self._text(token_id): logprob for token_id, logprob in entry.top})
            columns["text_offset"].append(offset)
            offset += len(text)
        self._text_offsets[index] = offset
        return columns

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def usage_json(usages: Iterable[Usage]) -> dict[str, Any]:
    """The sum over the prompts of one call."""
    all_usages = list(usages)
    prompt = sum(usage.prompt_tokens for usage in all_usages)
    completion = sum(usage.completion_tokens for usage in all_usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in all_usages)},
    }


def error_json(error: PilotfishError) -> dict[str, Any]:
    return {
        "error": {"message": clipped(error.message), "type": status_row(error).openai_type, "code": error.code, "param": None}
    }
