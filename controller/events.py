"""What a request's reader receives, in order: one Started, Deltas, one Usage; or a typed error in place of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.requests import FinishReason, StepOutput
from ..common.routing import RouteScore
from ..text.output import TextDelta


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The request was accepted and waits for a replica."""

    request_id: str
    model: str
    created_unix_s: int
    prompt_tokens: int


@dataclass(kw_only=True, slots=True)  # not frozen: there is one a token
class Delta:
    """New text and tokens of choice `index`. The last one of a choice carries its finish reason.

    A slow reader gets fewer, larger deltas: what it has not read yet is joined into one per choice.
    """

    index: int
    content: TextDelta


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """The last event. Tokens of all choices; `cached_tokens` are prompt tokens that the prefix cache saved.

    Times are from the request's arrival: `queue_ms` until a replica had room, `ttft_ms` until the first token was here.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_ms: float
    ttft_ms: float
    total_ms: float
    replica: str


Event = Started | Delta | Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """A request that has ended, for metrics and logs.

    `error_code` is a code of common/errors.py, or empty; `num_attempts` is the most replicas that one of its choices used.
    """

    request_id: str
    model: str
    usage: Usage
    has_first_token: bool
    finish_reasons: tuple[FinishReason, ...]
    error_code: str
    num_attempts: int


class Observer:
    """Is told what happens, on the event loop; must be quick and must not raise. A subclass takes what it wants to know."""

    def on_request_end(self, record: RequestRecord) -> None:
        """An accepted request has ended."""

    def on_refused(self, error_code: str) -> None:
        """A request was refused before it was accepted."""

    def on_dispatch(self, request_id: str, index: int, wire_id: str, replica: str, scores: Sequence[RouteScore]) -> None:
        """Choice `index` goes to a replica, in a run of the name `wire_id`."""

    def on_return(self, request_id: str, index: int, wire_id: str, reason: str) -> None:
        """The run's replica was lost or gave it up: the choice waits again."""

    def on_step(self, replica: str, step: StepOutput) -> None:
        """A replica has ended a step; its outputs go to their streams next."""
