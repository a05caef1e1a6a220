"""A request in flight: its choices, what they have produced, and the delivery to its reader.

A stream lives from its arrival until every choice has finished, an error ended it, or its reader left. One that is resumable
outlives its reader: another may come, and begins where its client's copy of the answer ends. The dispatcher applies workers'
outputs to the choices, which keep all of them; a reader remembers how far it is, so a slow one gets fewer, larger deltas, costs
at most its own max_tokens and holds up nobody. It is woken once a step however many choices it has, when its turn has come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..common.errors import Cancelled, DeadlineExceeded, PilotfishError
from ..common.requests import SequenceOutput
from ..common.tenants import ANONYMOUS, Tenant
from ..proto.journal_pb2 import JournalEntry
from .events import Delta, Event, RequestRecord, Started, Usage
from .front_end import Prepared
from .outlet import Outlet, Turn
from .sequence_state import Position, Received, SequenceState


class RequestStream:
    """See the module's docstring. `on_end` is called once, when nothing more will be produced.

    Attributes:
        accepted: it was started; it leaves a record.
        tenant: whose it is.
        tokens_taken: of its tenant's tokens a minute, until it is known what it used.
        resume_window_s: how long it runs on without a reader; 0: not at all.
        is_resumable: its client may come back to it, to any door.
        entry: of a request that a gateway process reads or an earlier controller had: what it was made of.
        was_left: it ended because it had no reader for too long.
        is_suspended: a controller before this one had it, and its client has not come back yet.
    """

    def __init__(
        self,
        *,
        request_id: str,
        model: str,
        timeout_s: float,
        on_end: Callable[[RequestStream], None],
        outlet: Outlet,
        tenant: Tenant = ANONYMOUS,
        resume_window_s: float = 0.0,
        is_resumable: bool = False,
        age_s: float = 0.0,
    ) -> None:
        """`timeout_s` counts from its arrival, which was `age_s` ago."""
        self.request_id = request_id
        self.model = model
        self.tenant = tenant
        self.tokens_taken = 0.0
        self.sequences: list[SequenceState] = []
        self.accepted = False
        self.ended = False
        self.error: PilotfishError | None = None
        self.created_unix_s = int(time.time())
        self.resume_window_s = resume_window_s
        self.is_resumable = is_resumable
        self.is_suspended = False
        self.was_left = False
        self.entry: JournalEntry | None = None
        self._on_end = on_end
        self._outlet = outlet
        self._num_prompt_tokens = 0
        self._arrival = time.monotonic() - age_s
        self._timeout_s = timeout_s
        self._dispatched: float | None = None
        self._first_token: float | None = None
        self._end_time: float | None = None
        self._usage: Usage | None = None  # the last one
        self._reader: Reader | None = None
        self._absence_timer: asyncio.TimerHandle | None = None
        self._timer = asyncio.get_running_loop().call_later(max(0.0, timeout_s - age_s), self.expire)

    def start(self, prepared: Prepared) -> None:
        """The request was accepted. Every choice opens with the prompt's text, where the caller wants it (echo)."""
        self.accepted = True
        self.sequences = [
            SequenceState(
                stream=self,
                index=index,
                request=request,
                text=text,
                prompt_hashes=prepared.prompt_hashes,
                version=prepared.version,
            )
            for index, (request, text) in enumerate(zip(prepared.requests, prepared.texts, strict=True))
        ]
        self._num_prompt_tokens = prepared.num_prompt_tokens
        if prepared.prompt_text:
            for sequence in self.sequences:
                sequence.texts.append(prepared.prompt_text)

    def started(self) -> Started:
        return Started(
            request_id=self.request_id,
            model=self.model,
            created_unix_s=self.created_unix_s,
            prompt_tokens=self._num_prompt_tokens,
        )

    def read(self, positions: Mapping[int, Position] | None = None) -> StreamReader:
        """A reader from the beginning, or from where it has come in each choice. One that reads already is ended."""
        reader = StreamReader(self, positions or {}, self._outlet.turn())
        self.attach(reader)
        return reader

    def attach(self, reader: Reader) -> None:
        """From now on it is woken. One that reads already is ended."""
        if self._absence_timer is not None:
            self._absence_timer.cancel()
        if self._reader is not None:
            self._reader.supersede()
        self._reader = reader

    @property
    def reader(self) -> Reader | None:
        return self._reader

    def leave(self, reader: Reader) -> None:
        """A reader goes; without another the request ends, at once or after `resume_window_s`."""
        if reader is not self._reader:
            return
        self._reader = None
        self.wait_for_reader()

    def wait_for_reader(self) -> None:
        """The request goes on for `resume_window_s`."""
        if self.ended:
            return
        if self.resume_window_s:
            self._absence_timer = asyncio.get_running_loop().call_later(self.resume_window_s, self._expire_absence)
        else:
            self._expire_absence()

    def positions_after(self, received: Sequence[Received]) -> dict[int, Position]:
        """Where a reader goes on whose client has that much of each choice. Raises InvalidRequest: nobody can have it."""
        return {s.index: s.position_after(received[s.index]) for s in self.sequences}

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

    def note_run(self, sequence: SequenceState, *, replica: str, num_attempts: int, queue_ms: float) -> None:
        """Where a choice runs, as the controller's process says it to the one that has the doors."""
        sequence.replica, sequence.num_attempts = replica, num_attempts
        if self._dispatched is None:
            self._dispatched = self._arrival + queue_ms / 1000

    def apply(self, sequence: SequenceState, output: SequenceOutput) -> bool:
        """Take a step's output for one choice; True if its text is complete while the worker still runs it (a stop string).

        A repeated token is dropped; a missing one raises InternalError.
        """
        num_known = len(sequence.output_token_ids)
        is_new = sequence.apply(output)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = output.cached_tokens
        if self._first_token is None and len(sequence.output_token_ids) > num_known:
            self._first_token = time.monotonic()
        if is_new:
            self._wake()
        if sequence.finish_reason is not None:
            self.end_if_complete()
        return sequence.text.should_abort

    def stop(self, sequence: SequenceState, *, num_tokens: int, reason: str) -> None:
        """The process that makes the text found a stop string: the choice ends with so many tokens."""
        sequence.stop(num_tokens=num_tokens, reason=reason)
        self.end_if_complete()

    def end_if_complete(self) -> None:
        if not self.ended and all(s.finish_reason is not None for s in self.sequences):
            self._end()

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

    def usage(self) -> Usage:
        """Counts and times up to now (up to the end, once ended)."""
        if self._usage is not None:
            return self._usage
        now = self._end_time or time.monotonic()
        first = self.sequences[0] if self.sequences else None
        usage = Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=sum(len(s.output_token_ids) for s in self.sequences),
            cached_tokens=(first.cached_tokens or 0) if first else 0,
            queue_ms=1000 * ((self._dispatched or now) - self._arrival),
            ttft_ms=1000 * ((self._first_token or now) - self._arrival),
            total_ms=1000 * (now - self._arrival),
            replica=first.replica if first else "",
        )
        if self.ended:
            self._usage = usage
        return usage

    @property
    def timeout_s(self) -> float:
        """From its arrival."""
        return self._timeout_s

    @property
    def age_s(self) -> float:
        """Since its arrival."""
        return time.monotonic() - self._arrival

    @property
    def queue_ms(self) -> float:
        """From its arrival until a replica had room for its first choice; 0 before."""
        return 0.0 if self._dispatched is None else 1000 * (self._dispatched - self._arrival)

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

    def _end(self) -> None:
        self.ended = True
        self._end_time = time.monotonic()
        self._timer.cancel()
        if self._absence_timer is not None:
            self._absence_timer.cancel()
        self._wake()
        self._on_end(self)

    def _expire_absence(self) -> None:
        self.was_left = True
        waited = f" for {self.resume_window_s:g} s" if self.resume_window_s else ""
        self.fail(Cancelled(f"request {self.request_id} was cancelled: its client was gone{waited}"))

    def _wake(self) -> None:
        if self._reader is not None:
            self._reader.wake.set()


class Wake(Protocol):
    """An asyncio.Event, or what is told the same way."""

    def set(self) -> None: ...


class Reader(Protocol):
    """Who a stream wakes when there may be more, and tells when another takes its place."""

    @property
    def wake(self) -> Wake: ...
    def supersede(self) -> None: ...


class StreamReader:
    """The events of a stream that its client has not seen, in order.

    Attributes:
        wake: set when there may be more.
        has_all: there is nothing more to come but the error, if one ended the stream.
    """

    __slots__ = ("_has_begun", "_is_superseded", "_places", "_stream", "has_all", "wake")

    def __init__(self, stream: RequestStream, positions: Mapping[int, Position], wake: Turn) -> None:
        self._stream = stream
        self._places = [(sequence, positions.get(index) or Position()) for index, sequence in enumerate(stream.sequences)]
        self._has_begun = False
        self._is_superseded = False
        self.wake = wake
        self.has_all = False

    def supersede(self) -> None:
        """Another reader has come: this one gets Cancelled."""
        self._is_superseded = True
        self.wake.set()

    async def next_events(self) -> list[Event]:
        """Waits until there is something to `take`, or the end."""
        while not self.has_all:
            await self.wake.wait()
            if events := self.take():
                return events
        return self.take()

    def take(self) -> list[Event]:
        """All there is to read now: empty for nothing, and at the end, or raises the stream's error in place of the end.

        Raises:
            Cancelled: another reader has come.
        """
        if self.has_all:
            if self._stream.error is not None:
                raise self._stream.error
            return []
        if self._is_superseded:
            raise Cancelled(f"request {self._stream.request_id} is read by another call, which resumed it")
        self.wake.clear()
        stream = self._stream
        events: list[Event] = []
        if not self._has_begun:
            self._has_begun = True
            events.append(stream.started())
        for sequence, position in self._places:
            content = sequence.delta_from(position)
            if content is not None:
                events.append(Delta(index=sequence.index, content=content))
        if stream.ended:
            self.has_all = True
            if stream.error is None:
                events.append(stream.usage())
        return events
