"""What calls return: frozen values, no protobuf.

A `CompletionBuilder` collects one answer's events; the sync and the async stream both use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..common.errors import InternalError
from ..common.requests import FinishReason
from ..proto import codec
from ..proto import common_pb2 as common
from ..proto import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """An alternative at a position: token id, natural logarithm of its probability, the token's bytes."""

    token_id: int
    logprob: float
    token: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """A produced token's log probability, its rank (1 = likeliest) and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    token: bytes
    rank: int
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """New text and tokens of one choice; `offset` is the output position of token_ids[0].

    Text may lag behind tokens (half a character, the possible beginning of a stop string). The last delta of a choice has its
    `finish_reason`, and in `stop_reason` the stop string that matched, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    offset: int
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One answer: all its deltas together. `finish_reason` is None while it is not complete."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: FinishReason | None
    stop_reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request took. Times in milliseconds at the gateway, from the request's arrival there.

    Attributes:
        cached_tokens: prompt tokens that the prefix cache saved.
        queue_ms: until a replica had room.
        ttft_ms: until the first token.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_ms: float
    ttft_ms: float
    total_ms: float
    replica: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """An answer, or what has arrived of it: `usage` is None until it is whole.

    `text`, `token_ids`, `logprobs` and `finish_reason` are those of the first choice.
    """

    request_id: str
    model: str
    created_unix_s: int
    prompt_tokens: int
    choices: tuple[Choice, ...]
    usage: Usage | None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[Logprob, ...]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenization:
    """Token ids and, of each, the bytes it stands for."""

    token_ids: tuple[int, ...]
    tokens: tuple[bytes, ...]


@dataclass(kw_only=True, slots=True)
class _GrowingChoice:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str = ""


class CompletionBuilder:
    """Adds up the events of one answer, over all the calls that it takes."""

    def __init__(self, *, num_choices: int) -> None:
        self._started = pb.RequestStarted()
        self._choices = [_GrowingChoice() for _ in range(num_choices)]
        self._usage: Usage | None = None
        self.has_delta = False

    @property
    def is_whole(self) -> bool:
        return self._usage is not None

    @property
    def request_id(self) -> str:
        return self._started.request_id

    def add(self, events: pb.GenerateEvents) -> list[Delta]:
        """The deltas of a message, in order.

        Raises:
            InternalError: the server skipped or repeated tokens, or answered with a choice that was not asked for.
        """
        if events.HasField("started"):
            self._started = events.started
        deltas = [delta for message in events.deltas if (delta := self._add_delta(message)) is not None]
        if events.HasField("usage"):
            self._usage = _usage(events.usage)
        return deltas

    def received(self) -> list[pb.ReceivedChoice]:
        """How far the answer is here, for a Resume."""
        return [
            pb.ReceivedChoice(token_ids=choice.token_ids, num_chars=sum(map(len, choice.texts))) for choice in self._choices
        ]

    def text(self, index: int = 0) -> str:
        return "".join(self._choices[index].texts)

    def build(self) -> Completion:
        return Completion(
            request_id=self._started.request_id,
            model=self._started.model,
            created_unix_s=self._started.created_unix_s,
            prompt_tokens=self._started.prompt_tokens,
            choices=tuple(
                Choice(
                    index=index,
                    text="".join(choice.texts),
                    token_ids=tuple(choice.token_ids),
                    logprobs=tuple(choice.logprobs),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                )
                for index, choice in enumerate(self._choices)
            ),
            usage=self._usage,
        )

    def _add_delta(self, message: pb.TextDelta) -> Delta | None:
        self.has_delta = True
        if message.index >= len(self._choices):
            raise InternalError(f"request {self.request_id}: the server sent choice {message.index}, which was not asked for")
        choice = self._choices[message.index]
        if choice.finish_reason is not None and not message.token_ids and not message.text:
            return None  # a call that resumed says the end again
        if message.offset != len(choice.token_ids):
            raise InternalError(
                f"request {self.request_id}: choice {message.index} went on at token {message.offset} instead of "
                f"{len(choice.token_ids)}: the server lost or repeated tokens"
            )
        delta = Delta(
            index=message.index,
            text=message.text,
            token_ids=tuple(message.token_ids),
            offset=message.offset,
            logprobs=tuple(map(_logprob, message.logprobs)),
            finish_reason=codec.finish_reason_from_proto(message.finish_reason),
            stop_reason=message.stop_reason,
        )
        choice.texts.append(delta.text)
        choice.token_ids.extend(delta.token_ids)
        choice.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        return delta


def _logprob(message: common.TokenLogprob) -> Logprob:
    return Logprob(
        token_id=message.token_id,
        logprob=message.logprob,
        token=message.token,
        rank=message.rank,
        top=tuple(TopLogprob(entry.token_id, entry.logprob, entry.token) for entry in message.top),
    )


def _usage(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
        queue_ms=message.queue_ms,
        ttft_ms=message.ttft_ms,
        total_ms=message.total_ms,
        replica=message.replica,
    )
