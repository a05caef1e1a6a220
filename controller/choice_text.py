"""What turns a choice's outputs into deltas: `SequenceText` in the process that has the doors, else `SequenceTokens`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from ..common.errors import InternalError
from ..common.requests import FinishReason, SequenceOutput
from ..common.sampling_params import SamplingParams
from ..text.output import TextDelta


class ChoiceText(Protocol):
    """One choice's; see `SequenceText`."""

    should_abort: bool

    def push(self, output: SequenceOutput) -> TextDelta: ...


MakeText: TypeAlias = Callable[[SamplingParams, bool], ChoiceText]
"""Of what a request asks for, and whether its answer continues a text (else it begins one, in a chat)."""


class SequenceTokens:
    """Each token once, and no text: the controller's part of a choice whose text a gateway process makes.

    Stop strings are found there; until the gateway says so the choice runs on.
    """

    should_abort = False

    def __init__(self) -> None:
        self._num_tokens = 0
        self._finish_reason: FinishReason | None = None

    def push(self, output: SequenceOutput) -> TextDelta:
        """The new part of an output; after the end everything is dropped.

        Raises:
            InternalError: tokens are missing between the last output and this one.
        """
        offset = self._num_tokens
        num_seen = offset - output.offset
        if self._finish_reason is not None:
            return TextDelta(offset=offset)
        if num_seen < 0:
            raise InternalError(f"{output.request_id}: tokens {offset} to {output.offset - 1} of the output are missing")
        token_ids = output.token_ids[num_seen:]
        self._num_tokens += len(token_ids)
        self._finish_reason = output.finish_reason
        return TextDelta(
            token_ids=token_ids, logprobs=output.logprobs[num_seen:], finish_reason=output.finish_reason, offset=offset
        )


def tokens_only(_params: SamplingParams, _continues_text: bool) -> ChoiceText:
    """A MakeText."""
    return SequenceTokens()
