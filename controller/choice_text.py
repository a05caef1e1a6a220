"""What turns a choice's outputs into deltas, as a type: the controller needs no tokenizer where it is handed one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from ..common.requests import SequenceOutput
from ..common.sampling_params import SamplingParams
from ..text.output import TextDelta


class ChoiceText(Protocol):
    """One choice's; see `SequenceText`."""

    should_abort: bool

    def push(self, output: SequenceOutput) -> TextDelta: ...


MakeText: TypeAlias = Callable[[SamplingParams, bool], ChoiceText]
"""Of what a request asks for, and whether its answer continues a text (else it begins one, in a chat)."""
