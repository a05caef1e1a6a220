"""One choice of a request in flight: where it runs, and all it has produced, for its reader and for a replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..common.errors import InvalidRequest
from ..common.hashing import version_salt
from ..common.requests import EngineRequest, FinishReason, SequenceOutput, TokenLogprob
from ..text.output import TextDelta
from .choice_text import ChoiceText

if TYPE_CHECKING:
    from .streams import RequestStream


@dataclass(frozen=True, slots=True)
class Received:
    """What a client has of a choice: its tokens, and how many characters of its text."""

    token_ids: tuple[int, ...] = ()
    num_chars: int = 0


@dataclass(slots=True)
class Position:
    """How far a reader is in a choice: tokens, pieces of text, and whether it was told the end."""

    num_tokens: int = 0
    num_texts: int = 0
    has_end: bool = False


@dataclass(kw_only=True, slots=True, eq=False)
class SequenceState:
    """One choice of a request, wherever it runs. `output_token_ids` is what a replay on another replica starts from.

    `wire_id` names its current run on a worker; every dispatch makes a new one, so that late output of an earlier run can never
    be taken for this one's. `prompt_hashes` are those of the prompt's full blocks under `version` of the model, which is
    that of its replica from its first run on. `texts` is the text in the pieces in which
    it came; `logprobs[i]` is that of token i, None where a restarted controller does not have it any more. `charged_ms` is what
    its tenant was charged for it; `num_refusals` counts workers that sent it back since it last got a token.
    """

    stream: RequestStream
    index: int
    request: EngineRequest
    text: ChoiceText
    prompt_hashes: Sequence[bytes]
    version: str = ""
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    wire_id: str = ""
    replica: str = ""
    num_attempts: int = 0
    num_refusals: int = 0
    abort_sent: bool = False
    cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str = ""
    charged_ms: float = 0.0

    @property
    def cache_salt(self) -> bytes:
        """What separates its blocks from others': the tenant's salt, under its version."""
        return version_salt(self.version, self.request.salt)

    def dispatched(self, wire_id: str, replica: str) -> None:
        """A run on a replica begins."""
        self.wire_id, self.replica = wire_id, replica
        self.num_attempts += 1
        self.abort_sent = False
        self.stream.mark_dispatched()

    def to_submit(self) -> EngineRequest:
        """The request for the worker: all known tokens, and the time that is left."""
        return replace(
            self.request,
            request_id=self.wire_id,
            salt=self.cache_salt,
            output_token_ids=tuple(self.output_token_ids),
            deadline_ms=self.stream.time_left_s() * 1000,
            tenant=self.stream.tenant,
        )

    def apply(self, output: SequenceOutput) -> bool:
        """Take what an engine produced; whether there is anything new in it. Raises InternalError where tokens are missing."""
        delta = self.text.push(output)
        if delta.logprobs:
            self.logprobs.extend([None] * (len(self.output_token_ids) - len(self.logprobs)))
            self.logprobs.extend(delta.logprobs)
        self.output_token_ids.extend(delta.token_ids)
        if delta.text:
            self.texts.append(delta.text)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        return not delta.is_empty

    def stop(self, *, num_tokens: int, reason: str) -> None:
        """It ends with so many tokens; the engine may have made more."""
        if self.finish_reason is None:
            del self.output_token_ids[num_tokens:]
            del self.logprobs[num_tokens:]
            self.finish_reason, self.stop_reason = FinishReason.STOP, reason

    def learn(self, token_ids: Sequence[int]) -> None:
        """Take tokens that somebody else kept; a choice that they complete ends.

        Raises:
            InvalidRequest: they are not of this answer.
        """
        num_common = min(len(token_ids), len(self.output_token_ids))
        if list(token_ids[:num_common]) != self.output_token_ids[:num_common]:
            raise InvalidRequest(
                f"{self.request.request_id}: the tokens that the client has are not those of this answer; begin it anew"
            )
        if self.finish_reason is not None or len(token_ids) == num_common:
            return
        self.apply(SequenceOutput(request_id=self.request.request_id, offset=0, token_ids=tuple(token_ids)))
        sampling, num_output = self.request.sampling, len(self.output_token_ids)
        if self.finish_reason is not None:  # a stop string
            return
        if num_output > sampling.min_tokens and self.output_token_ids[-1] in sampling.end_token_ids:
            reason = FinishReason.STOP
        elif num_output >= sampling.max_tokens:
            reason = FinishReason.LENGTH
        else:
            return
        self.apply(SequenceOutput(request_id=self.request.request_id, offset=num_output, finish_reason=reason))

    def position_after(self, received: Received) -> Position:
        """Where a reader goes on that has that much. Raises InvalidRequest: nobody can have it."""
        text = "".join(self.texts)
        if received.num_chars > len(text) or len(received.token_ids) > len(self.output_token_ids):
            raise InvalidRequest(f"{self.request.request_id}: the client has more than there is; begin the request anew")
        self.texts[:] = [text[: received.num_chars], text[received.num_chars :]]
        return Position(num_tokens=len(received.token_ids), num_texts=1)

    def delta_from(self, position: Position) -> TextDelta | None:
        """What a reader at `position` has not read, which it then has; None for nothing."""
        has_end = self.finish_reason is not None
        begin, end = position.num_tokens, len(self.output_token_ids)
        text = "".join(self.texts[position.num_texts :])
        if begin == end and not text and has_end == position.has_end:
            return None
        position.num_tokens, position.num_texts, position.has_end = end, len(self.texts), has_end
        return TextDelta(
            text=text,
            token_ids=tuple(self.output_token_ids[begin:end]),
            logprobs=tuple(entry for entry in self.logprobs[begin:end] if entry is not None) if self.logprobs else (),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            offset=begin,
        )
