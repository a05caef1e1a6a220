"""What a Pipeline returns: frozen values, and the builder that adds up one prompt's answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..common.errors import InternalError, PilotfishError
from ..common.requests import FinishReason, SequenceOutput, TokenLogprob
from ..text.output import SequenceText, TextDelta
from ..text.prepare import PreparedRequest
from ..text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """New text and tokens of choice `index`; `offset` is the output position of token_ids[0].

    Text may lag behind tokens (half a character, the possible beginning of a stop string). The last delta of a choice has its
    `finish_reason`, and in `stop_reason` the stop string that matched, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    offset: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One answer. `logprobs` has an entry for each token where they were asked for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop_reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A prompt's answer: `n` choices, or the error that kept it from having one (a part of it may be there even so).

    `text`, `token_ids`, `logprobs` and `finish_reason` are those of the first choice; of an error without one they are "", (),
    () and ERROR. `cached_tokens` are prompt tokens that the prefix cache saved.
    """

    choices: tuple[Choice, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: PilotfishError | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text if self.choices else ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids if self.choices else ()

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.choices[0].logprobs if self.choices else ()

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason if self.choices else FinishReason.ERROR


@dataclass(slots=True)
class _GrowingChoice:
    text: SequenceText
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stop_reason: str = ""


class CompletionBuilder:
    """Adds up the engine's outputs for one prompt.

    Attributes:
        error: what ended a choice, if it was an error.
        cached_tokens: of the choice that saved most.
    """

    def __init__(self, prepared: PreparedRequest, tokenizer: Tokenizer, *, continues_text: bool) -> None:
        self._prompt_tokens = len(prepared.prompt_token_ids)
        self._choices = [
            _GrowingChoice(SequenceText(tokenizer, prepared.params, continues_text=continues_text)) for _ in prepared.sequences
        ]
        self.error: PilotfishError | None = None
        self.cached_tokens = 0

    @property
    def is_complete(self) -> bool:
        return all(choice.text.finish_reason is not None for choice in self._choices)

    def add(self, index: int, output: SequenceOutput) -> Delta | None:
        """Takes an output of choice `index`; returns what is new in it, if anything."""
        choice = self._choices[index]
        delta = choice.text.push(output)
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        if output.finish_reason is FinishReason.ERROR and self.error is None:
            self.error = InternalError(output.error)
        if delta.is_empty:
            return None
        choice.pieces.append(delta.text)
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        choice.stop_reason = delta.stop_reason
        return _with_index(index, delta)

    def should_abort(self, index: int) -> bool:
        """Whether a stop string ended the choice while its engine still runs it."""
        return self._choices[index].text.should_abort

    def build(self) -> Completion:
        """The completion, once all choices have ended."""
        choices = tuple(
            Choice(
                index=index,
                text="".join(choice.pieces),
                token_ids=tuple(choice.token_ids),
                logprobs=tuple(choice.logprobs),
                finish_reason=choice.text.finish_reason or FinishReason.ABORT,
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(self._choices)
        )
        return Completion(
            choices=choices, prompt_tokens=self._prompt_tokens, cached_tokens=self.cached_tokens, error=self.error
        )


def _with_index(index: int, delta: TextDelta) -> Delta:
    return Delta(
        index=index,
        text=delta.text,
        token_ids=delta.token_ids,
        offset=delta.offset,
        logprobs=delta.logprobs,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
    )
