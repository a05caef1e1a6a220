"""An engine's tokens to what a client reads: text, cut at stop strings, each token once.

One `SequenceText` lives as long as one choice of a request; it survives the loss of a replica, since offsets are absolute.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import InternalError
from ..common.requests import FinishReason, SequenceOutput, TokenLogprob
from ..common.sampling_params import SamplingParams
from .detokenizer import IncrementalDetokenizer
from .stop_strings import StopMatcher
from .tokenizer import Tokenizer


@dataclass(kw_only=True, slots=True)  # not frozen, which would cost: there are two a token
class TextDelta:
    """New text and tokens of one choice. Text may lag behind tokens: half a character, or what may begin a stop string.

    Attributes:
        offset: output position of token_ids[0].
        logprobs: one for each token, where they were asked for.
        stop_reason: the stop string that matched, "" for none.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str = ""
    offset: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.token_ids or self.finish_reason)


class SequenceText:
    """Turns one choice's `SequenceOutput`s into `TextDelta`s.

    A stop string ends the choice here, where the engine knows only tokens: `should_abort` then says that the engine has to be
    told. The token that completed it is the last one reported. Stop strings are looked for after `min_tokens` tokens.

    `continues_text`: see `IncrementalDetokenizer`; True for a completion of a text prompt, False for an answer in a chat.

    Attributes:
        num_tokens: output tokens reported so far, which is the next offset expected.
        finish_reason: None while running.
        should_abort: the choice ended here and its engine may still be running it.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, continues_text: bool = False) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens, continues_text=continues_text
        )
        self._matcher = StopMatcher(params.stop, include=params.include_stop_str_in_output)
        self._has_stop = bool(params.stop)
        self._min_tokens = params.min_tokens
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.should_abort = False

    def push(self, output: SequenceOutput) -> TextDelta:
        """The new part of an output. Tokens seen before are dropped; after the end everything is, and the delta is empty.

        Raises:
            InternalError: tokens are missing between the last output and this one.
        """
        if self.finish_reason is not None:
            return TextDelta(offset=self.num_tokens)
        offset = self.num_tokens
        num_seen = offset - output.offset
        if num_seen < 0:
            raise InternalError(f"{output.request_id}: tokens {offset} to {output.offset - 1} of the output are missing")
        token_ids = output.token_ids[num_seen:] if num_seen else output.token_ids
        pieces = []
        stop_reason = None
        for token_id in token_ids:
            text = self._detokenizer.push(token_id)
            self.num_tokens += 1
            if text and self._has_stop and self.num_tokens > self._min_tokens:
                text, stop_reason = self._matcher.push(text)
            pieces.append(text)
            if stop_reason is not None:
                break
        if stop_reason is None and output.finish_reason is not None:
            text, stop_reason = self._finish()
            pieces.append(text)
        if stop_reason is not None:
            self.finish_reason = FinishReason.STOP
            self.should_abort = output.finish_reason is None
        else:
            self.finish_reason = output.finish_reason
        num_new = self.num_tokens - offset
        return TextDelta(
            text="".join(pieces),
            token_ids=token_ids[:num_new],
            logprobs=output.logprobs[num_seen:][:num_new],
            finish_reason=self.finish_reason,
            stop_reason=stop_reason or "",
            offset=offset,
        )

    def _finish(self) -> tuple[str, str | None]:
        """What was held back, now that no token will follow."""
        text, stop_reason = self._matcher.push(self._detokenizer.flush())
        return text + self._matcher.flush(), stop_reason
