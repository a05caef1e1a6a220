"""The requests in flight by id, and those a client may still come back for.

A resumable request is in the journal from before it is queued until `resume_window_s` after it has ended: its client may have
missed the end. A controller that starts finds there what its predecessor had, and holds it suspended until the client resumes
it or the window has passed; workers that run it go on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from ..common.errors import InvalidRequest, RequestNotFound, Unavailable
from ..common.tenants import ANONYMOUS, Tenant
from ..proto.journal_pb2 import JournalEntry
from .choice_text import MakeText
from .dispatcher import Dispatcher
from .front_end import Prepared
from .journal import Journal, entry_of, prepared_of
from .outlet import Outlet
from .sequence_state import Received
from .streams import RequestStream, StreamReader

logger = logging.getLogger(__name__)

_MAX_ENDED = 4096  # kept at most; the oldest go first


class StreamTable:
    """See the module's docstring. `on_end` hears of every stream that has ended."""

    def __init__(
        self, *, model: str, dispatcher: Dispatcher, journal: Journal, window_s: float, on_end: Callable[[RequestStream], None]
    ) -> None:
        self._model = model
        self._dispatcher = dispatcher
        self._journal = journal
        self._window_s = window_s
        self._on_end = on_end
        self._outlet = Outlet()
        self._running: dict[str, RequestStream] = {}
        self._ended: dict[str, tuple[float, RequestStream]] = {}
        self._sweep_timer: asyncio.TimerHandle | None = None

    def check_free(self, request_id: str) -> None:
        """Raises InvalidRequest: the id is in flight."""
        if request_id in self._running:
            raise InvalidRequest(f"request_id {request_id!r} is in flight already; ids must be unique among running requests")

    def add(
        self,
        request_id: str,
        *,
        timeout_s: float,
        resumable: bool,
        tenant: Tenant = ANONYMOUS,
        age_s: float = 0.0,
        entry: JournalEntry | None = None,
    ) -> RequestStream:
        """A request of an id that is free. One with an entry is read by a process that may lose its connection to this one."""
        self._ended.pop(request_id, None)
        stream = RequestStream(
            request_id=request_id,
            model=self._model,
            timeout_s=timeout_s,
            on_end=self._ends,
            outlet=self._outlet,
            tenant=tenant,
            resume_window_s=self._window_s if resumable or entry else 0.0,
            is_resumable=resumable,
            age_s=age_s,
        )
        if entry is not None:
            stream.entry, stream.created_unix_s = entry, entry.created_unix_s
        self._running[request_id] = stream
        return stream

    def start(self, stream: RequestStream, prepared: Prepared) -> None:
        """The request is accepted: from here on it survives this controller, if it is resumable."""
        stream.start(prepared)
        self._note(stream, prepared)

    def get(self, request_id: str) -> RequestStream | None:
        """A request in flight."""
        return self._running.get(request_id)

    def get_kept(self, request_id: str) -> RequestStream | None:
        """A request in flight, or one whose end is kept."""
        return self._running.get(request_id) or self._ended.get(request_id, (0.0, None))[1]

    def in_flight(self) -> list[RequestStream]:
        return list(self._running.values())

    def resume(self, request_id: str, received: Sequence[Received], *, tenant: Tenant) -> tuple[RequestStream, StreamReader]:
        """A reader that begins where the client's copy of the answer ends.

        Raises:
            RequestNotFound: this tenant has nothing to resume of that id.
            InvalidRequest: the client has what this answer does not have.
        """
        stream = self.find(request_id, tenant=tenant)
        self.take_up(stream, received)
        return stream, stream.read(stream.positions_after(received))

    def find(self, request_id: str, *, tenant: Tenant) -> RequestStream:
        """A request that its client may come back for.

        Raises:
            RequestNotFound: this tenant has nothing to resume of that id.
        """
        stream = self.get_kept(request_id)
        if stream is None or not stream.is_resumable or stream.tenant.name != tenant.name:
            raise RequestNotFound(f"no request {request_id!r} can be resumed here; begin it anew")
        if not stream.accepted:
            raise Unavailable(f"request {request_id} is still being prepared; try again in a moment", retry_after_s=0.1)
        return stream

    def take_up(self, stream: RequestStream, received: Sequence[Received]) -> None:
        """Somebody comes for a request with what there is of it: where it was an earlier controller's, it goes on behind that.

        Raises:
            InvalidRequest: they have what this answer does not have.
        """
        if len(received) != len(stream.sequences):
            raise InvalidRequest(f"request {stream.request_id} has {len(stream.sequences)} choices, not {len(received)}")
        if stream.is_suspended:
            stream.is_suspended = False
            for sequence, known in zip(stream.sequences, received, strict=True):
                self._dispatcher.resume(sequence, known.token_ids)
            stream.end_if_complete()
            self._dispatcher.pump()
        else:
            for sequence, known in zip(stream.sequences, received, strict=True):
                if len(known.token_ids) <= len(sequence.output_token_ids):
                    sequence.learn(known.token_ids)  # nothing new; it checks that they are the same

    def restore(self, tenant_of: Callable[[str], Tenant], *, make_text: MakeText, block_size: int) -> list[RequestStream]:
        """Take up what the journal has: before the doors open and the first worker is connected.

        `tenant_of` knows the tenants by their names.
        """
        for entry in self._journal.entries():
            time_left_s = entry.deadline_unix_s - time.time()
            if time_left_s <= 0 or entry.model != self._model:
                self._journal.remove([entry.request_id])
                continue
            stream = self.add(
                entry.request_id, timeout_s=time_left_s, resumable=True, tenant=tenant_of(entry.tenant), entry=entry
            )
            self.suspend(stream, prepared_of(entry, make_text=make_text, block_size=block_size))
            stream.wait_for_reader()
        if self._running:
            logger.warning("%d requests of an earlier controller wait for their clients", len(self._running))
        return self.in_flight()

    def suspend(self, stream: RequestStream, prepared: Prepared) -> None:
        """An earlier controller had this request: it may run on a worker, and waits for who knows how far it is."""
        stream.is_suspended = True
        stream.start(prepared)
        self._note(stream, prepared)
        self._dispatcher.expect(stream)

    def close(self) -> None:
        """Nothing is in flight any more, and the server ends in good order: nobody will come back."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self._journal.close(remove=True)

    def _note(self, stream: RequestStream, prepared: Prepared) -> None:
        if stream.is_resumable:
            entry = stream.entry or entry_of(stream, prepared)
            entry.deadline_unix_s = time.time() + stream.time_left_s()
            self._journal.add(entry)

    def _ends(self, stream: RequestStream) -> None:
        del self._running[stream.request_id]
        is_unseen = bool(stream.resume_window_s) and stream.reader is None
        if stream.accepted and (stream.is_resumable or is_unseen):
            self._ended[stream.request_id] = (time.monotonic() + self._window_s, stream)
            if self._sweep_timer is None or len(self._ended) > _MAX_ENDED:
                self._sweep()
        elif stream.is_resumable and stream.sequences:
            self._journal.remove([stream.request_id])
        self._on_end(stream)

    def _sweep(self) -> None:
        """Forget what nobody came back for."""
        now = time.monotonic()
        num_excess = len(self._ended) - _MAX_ENDED
        expired = [name for n, (name, (until, _)) in enumerate(self._ended.items()) if n < num_excess or until <= now]
        for name in expired:
            del self._ended[name]
        if expired:
            self._journal.remove(expired)
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        interval_s = self._window_s / 4
        self._sweep_timer = asyncio.get_running_loop().call_later(interval_s, self._sweep) if self._ended else None
