"""A request in flight: its choices, what they have produced, and the delivery to the one reader.

A stream lives from its arrival until every choice has finished, an error ended it, or its reader left. The dispatcher applies
workers' outputs to it; the reader takes events. Unread output is kept as one growing chunk a choice, so a slow reader costs
at most its own max_tokens and holds up nobody; a reader is woken once a step however many choices it has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..common.errors import DeadlineExceeded, PilotfishError
from ..common.requests import EngineRequest, FinishReason, SequenceOutput
from ..common.tenants import ANONYMOUS, Tenant
from ..text.output import SequenceText, TextDelta
from .events import Delta, Event, RequestRecord, Started, Usage
from .front_end import Prepared


@dataclass(kw_only=True, slots=True, eq=False)
class SequenceState:
    """One choice of a request, wherever it runs. `output_token_ids` is what a replay on another replica starts from.

    `wire_id` names its current run on a worker; every dispatch makes a new one, so that late output of an earlier run can never
    be taken for this one's. `prompt_hashes` are those of the prompt's full blocks. `charged_ms` is what its tenant was
    charged for it.
    """

    stream: RequestStream
    index: int
    request: EngineRequest
    text: SequenceText
    prompt_hashes: Sequence[bytes]
    output_token_ids: list[int] = field(default_factory=list)
    wire_id: str = ""
    replica: str = ""
    num_attempts: int = 0
    abort_sent: bool = False
    cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    charged_ms: float = 0.0

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
            output_token_ids=tuple(self.output_token_ids),
            deadline_ms=self.stream.time_left_s() * 1000,
            tenant=self.stream.tenant,
        )


class RequestStream:
    """See the module's docstring. `on_end` is called once, when nothing more will be produced."""

    def __init__(
        self,
        *,
        request_id: str,
        model: str,
        timeout_s: float,
        on_end: Callable[[RequestStream], None],
        tenant: Tenant = ANONYMOUS,
    ) -> None:
        self.request_id = request_id
        self.model = model
        self.tenant = tenant
        self.tokens_taken = 0.0  # of its tenant's tokens a minute, until it is known what it used
        self.sequences: list[SequenceState] = []
        self.accepted = False
        self.ended = False
        self.error: PilotfishError | None = None
        self._on_end = on_end
        self._num_prompt_tokens = 0
        self._arrival = time.monotonic()
        self._timeout_s = timeout_s
        self._dispatched: float | None = None
        self._first_token: float | None = None
        self._end_time: float | None = None
        self._usage_taken = False
        self._ready: list[Event] = []
        self._unread: dict[int, list[TextDelta]] = {}
        self._wake = asyncio.Event()
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self.expire)

    def start(self, prepared: Prepared) -> None:
        """The request was accepted. Every choice opens with the prompt's text, where the caller wants it (echo)."""
        self.accepted = True
        self.sequences = [
            SequenceState(stream=self, index=index, request=request, text=text, prompt_hashes=prepared.prompt_hashes)
            for index, (request, text) in enumerate(zip(prepared.requests, prepared.texts, strict=True))
        ]
        self._num_prompt_tokens = prepared.num_prompt_tokens
        self._ready.append(
            Started(
                request_id=self.request_id,
                model=self.model,
                created_unix_s=int(time.time()),
                prompt_tokens=prepared.num_prompt_tokens,
            )
        )
        if prepared.prompt_text:
            self._ready.extend(Delta(index=s.index, content=TextDelta(text=prepared.prompt_text)) for s in self.sequences)

    def refuse(self) -> None:
        """The request is not taken after all: it leaves no record."""
        self.accepted = False
        if not self.ended:
            self._end()

    def time_left_s(self) -> float:
        return max(0.0, self._arrival + self._timeout_s - time.monotonic())

    def mark_dispatched(self) -> None:
        if self._dispatched is None:
            self._dispatched = time.monotonic()

    def apply(self, sequence: SequenceState, output: SequenceOutput) -> bool:
        """Take a step's output for one choice; True if its text is complete while the worker still runs it (a stop string).

        A repeated token is dropped; a missing one raises InternalError.
        """
        delta = sequence.text.push(output)
        sequence.output_token_ids.extend(delta.token_ids)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = output.cached_tokens
        if delta.token_ids and self._first_token is None:
            self._first_token = time.monotonic()
        sequence.finish_reason = delta.finish_reason
        if delta.text or delta.token_ids or delta.finish_reason is not None:
            self._unread.setdefault(sequence.index, []).append(delta)
            self._wake.set()
        if delta.finish_reason is not None and all(s.finish_reason is not None for s in self.sequences):
            self._end()
        return sequence.text.should_abort

    def fail(self, error: PilotfishError) -> None:
        """End the request with an error, which the reader gets after what was produced. The first end counts."""
        if not self.ended:
            self.error = error
            self._end()

    def expire(self) -> None:
        """The time is up."""
        num_tokens = sum(len(s.output_token_ids) for s in self.sequences)
        self.fail(
            DeadlineExceeded(
                f"request {self.request_id} was not complete after its {self._timeout_s:g} s ({num_tokens} tokens were "
                "produced); allow more time or ask for fewer tokens"
            )
        )

    async def next_event(self) -> Event | None:
        """The next event, None at the end; raises the stream's error in its place."""
        while True:
            event = self._take()
            if event is not None:
                return event
            if self.ended:
                if self.error is not None:
                    raise self.error
                return None
            self._wake.clear()
            await self._wake.wait()

    def usage(self) -> Usage:
        """Counts and times up to now (up to the end, once ended)."""
        now = self._end_time or time.monotonic()
        first = self.sequences[0] if self.sequences else None
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=sum(len(s.output_token_ids) for s in self.sequences),
            cached_tokens=(first.cached_tokens or 0) if first else 0,
            queue_ms=1000 * ((self._dispatched or now) - self._arrival),
            ttft_ms=1000 * ((self._first_token or now) - self._arrival),
            total_ms=1000 * (now - self._arrival),
            replica=first.replica if first else "",
        )

    def record(self) -> RequestRecord:
        return RequestRecord(
            request_id=self.request_id,
            model=self.model,
            usage=self.usage(),
            has_first_token=self._first_token is not None,
            finish_reasons=tuple(s.finish_reason for s in self.sequences if s.finish_reason is not None),
            error_code=self.error.code if self.error else "",
            num_attempts=max((s.num_attempts for s in self.sequences), default=0),
        )

    def _take(self) -> Event | None:
        if not self._ready and self._unread:
            self._ready = [Delta(index=index, content=join(deltas)) for index, deltas in self._unread.items()]
            self._unread = {}
        if not self._ready and self.ended and self.error is None and not self._usage_taken:
            self._usage_taken = True
            return self.usage()
        return self._ready.pop(0) if self._ready else None

    def _end(self) -> None:
        self.ended = True
        self._end_time = time.monotonic()
        self._timer.cancel()
        self._wake.set()
        self._on_end(self)


def join(deltas: list[TextDelta]) -> TextDelta:
    """One delta that says the same as `deltas`, consecutive ones of a choice."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    with_tokens = next((delta for delta in deltas if delta.token_ids), last)
    return TextDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        offset=with_tokens.offset,
    )
