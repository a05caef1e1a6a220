"""Where requests enter the controller's process: ids, tenants' limits, the journal, the queue, and the record at the end.

A request comes as an `Arrival`, what is known of it before its content is looked at, and gets its tokens on the way in. From
the service of this process it has text states, from a gateway process (gateway_connection.py) none. Everything runs on the
controller's event loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .. import __version__
from ..common.cluster_state import ClusterState
from ..common.config import ServeConfig
from ..common.errors import Cancelled, PilotfishError, Unavailable
from ..common.requests import WorkerInfo
from ..common.routing import RouteDecision
from ..common.tenants import ANONYMOUS, Tenant
from ..proto.journal_pb2 import JournalEntry
from ..text.prepare import ModelLimits
from .autoscaler import Autoscaler
from .choice_text import MakeText
from .dispatcher import Dispatcher
from .events import Observer
from .fleet import Fleet
from .front_end import Prepared
from .journal import Journal
from .sequence_state import Received
from .stream_table import StreamTable
from .streams import RequestStream, StreamReader
from .tenants import Tenants
from .totals import Totals

if TYPE_CHECKING:
    from .tracing import RequestTracing


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A request before its content.

    Attributes:
        timeout_s: until the last token, from its arrival.
        age_s: since its arrival, where it came through a gateway process.
        retry_key: names the caller over several attempts of one call, for the place that a full queue holds for it.
        trace_headers: W3C `traceparent` and `tracestate`, where the caller traces.
        resumable: its client may lose its connection, and come back.
        is_more: of a call that was let in with another request of it, and is let in whole.
        entry: what it is made of, where a gateway process reads it; when that has lost its connection the request goes on.
    """

    request_id: str
    timeout_s: float
    age_s: float = 0.0
    priority: int = 0
    tenant: Tenant = ANONYMOUS
    retry_key: str = ""
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    resumable: bool = False
    is_more: bool = False
    entry: JournalEntry | None = None


class Intake:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        config: ServeConfig,
        fleet: Fleet,
        autoscaler: Autoscaler,
        dispatcher: Dispatcher,
        totals: Totals,
        journal: Journal,
        tracing: RequestTracing | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._autoscaler = autoscaler
        self._dispatcher = dispatcher
        self._totals = totals
        self._tracing = tracing
        self._observers = observers
        self._num_preparing = 0
        self._num_requests = 0
        self._started_unix_s = time.time()
        self._is_closed = False
        self.tenants = Tenants(config.tenants, isolate_cache=config.gateway.isolate_cache)
        self.streams = StreamTable(
            model=config.model.name,
            dispatcher=dispatcher,
            journal=journal,
            window_s=config.gateway.resume_window_s,
            on_end=self._on_stream_end,
        )

    async def admit(self, arrival: Arrival, prepare: Callable[[], Awaitable[Prepared]]) -> RequestStream:
        """Take a request in, and queue it once `prepare` has made tokens of it, or has raised TimeoutError.

        Raises:
            InvalidRequest, Overloaded (with retry_after_s), Unavailable, DeadlineExceeded, or what `prepare` raises.
        """
        try:
            stream = self._accept(arrival)
        except PilotfishError as error:
            self.report_refused(error)
            raise
        if self._tracing is not None:
            self._tracing.begin(stream.request_id, stream.model, arrival.trace_headers)
        self._num_preparing += 1
        try:
            try:
                prepared = await prepare()
            except TimeoutError:
                stream.expire()
            if stream.error is not None:  # aborted or out of time meanwhile
                raise stream.error
            self._take_tokens(stream, prepared)
            self.streams.start(stream, prepared)
            if self._tracing is not None:
                self._tracing.accepted(
                    stream.request_id, num_prompt_tokens=prepared.num_prompt_tokens, num_choices=len(prepared.requests)
                )
            self._dispatcher.enqueue(stream, retry_key=arrival.retry_key, is_more=arrival.is_more)
        except PilotfishError as error:
            self._refuse(stream, error)
            self.report_refused(error)
            raise
        except BaseException as error:
            self._refuse(stream, error)
            raise
        finally:
            self._num_preparing -= 1
        self._num_requests += 1
        return stream

    def readmit(self, arrival: Arrival, prepared: Prepared) -> RequestStream:
        """Take in what an earlier controller had admitted; it waits for who knows how far it is (`StreamTable.take_up`)."""
        self.tenants.limits(arrival.tenant).enter_again(_now_ms())
        stream = self._add(arrival)
        self.streams.suspend(stream, prepared)
        return stream

    def report_refused(self, error: PilotfishError) -> None:
        """A request came to nothing before it was here."""
        self.count_refused(error.code)

    def count_refused(self, error_code: str) -> None:
        for observer in self._observers:
            observer.on_refused(error_code)

    def stop(self, stream: RequestStream, index: int, *, num_tokens: int, reason: str) -> None:
        """The gateway process of a request found a stop string in a choice, which ends with so many tokens."""
        sequence = stream.sequences[index]
        if not stream.ended and sequence.finish_reason is None:
            self._dispatcher.drop(sequence)
            stream.stop(sequence, num_tokens=num_tokens, reason=reason)

    @property
    def is_serving(self) -> bool:
        """Whether a replica takes requests."""
        return self._fleet.is_serving

    @property
    def changed(self) -> asyncio.Event:
        """Set whenever a replica changes its state."""
        return self._fleet.changed

    async def resume(
        self, request_id: str, received: Sequence[Received], *, tenant: Tenant
    ) -> tuple[RequestStream, StreamReader]:
        """See `InferenceService.resume`."""
        return self.streams.resume(request_id, received, tenant=tenant)

    def restore(self, make_text: MakeText) -> None:
        """Take up the requests of an earlier controller, which wait for their clients then."""
        block_size = self._config.engine.block_size
        for stream in self.streams.restore(self.tenants.named, make_text=make_text, block_size=block_size):
            self.tenants.limits(stream.tenant).enter_again(_now_ms())

    async def abort(self, request_id: str, *, tenant: Tenant) -> bool:
        """See `InferenceService.abort`."""
        stream = self.streams.get(request_id)
        if stream is None or stream.tenant.name != tenant.name:
            return False
        stream.fail(Cancelled(f"request {request_id} was aborted"))
        return True

    def limits(self) -> ModelLimits:
        """What every replica can take. Raises Unavailable: none has served yet, or none ever will."""
        return self._fleet.limits()

    def info(self) -> WorkerInfo | None:
        """The facts of one replica's worker, None before any has started."""
        return self._fleet.info()

    def status(self) -> ClusterState:
        """All but what the front end and the doors know."""
        state = ClusterState(
            version=__version__,
            model=self._config.model.name,
            uptime_s=time.time() - self._started_unix_s,
            replicas=tuple(map(self._dispatcher.with_routing, self._fleet.statuses())),
            scaling=self._autoscaler.state(),
            num_queued=self._dispatcher.num_queued,
            num_running=self._dispatcher.num_running,
            generation_config=self._config.model.generation_config,
            sampling_defaults={},
            grpc_address="",
            http_address="",
            num_requests=self._num_requests,
            num_restarts=self._fleet.num_restarts,
            controller_pid=os.getpid(),
        )
        return self._totals.add_to(state)

    async def explain_route(self, request_id: str) -> tuple[RouteDecision, ...]:
        """See `InferenceService.explain_route`."""
        return self._dispatcher.explain(request_id)

    def close(self) -> None:
        """Refuse new requests from now on."""
        self._is_closed = True

    def end_all(self) -> None:
        """End what is still in flight."""
        for stream in self.streams.in_flight():
            stream.fail(Unavailable("the server is shutting down"))
        self.streams.close()

    def _accept(self, arrival: Arrival) -> RequestStream:
        if self._is_closed:
            raise Unavailable("the server is shutting down")
        tenant = arrival.tenant
        self.streams.check_free(arrival.request_id)
        if arrival.is_more:
            self.tenants.limits(tenant).enter_again(_now_ms())
            return self._add(arrival)
        self._dispatcher.check_room(
            self._num_preparing, tenant=tenant.name, priority=arrival.priority, retry_key=arrival.retry_key
        )
        self.tenants.limits(tenant).enter(_now_ms(), retry_key=arrival.retry_key)
        return self._add(arrival)

    def _add(self, arrival: Arrival) -> RequestStream:
        return self.streams.add(
            arrival.request_id,
            timeout_s=arrival.timeout_s,
            resumable=arrival.resumable,
            tenant=arrival.tenant,
            age_s=arrival.age_s,
            entry=arrival.entry,
        )

    def _take_tokens(self, stream: RequestStream, prepared: Prepared) -> None:
        """Of the tenant's tokens a minute, what the request is expected to use; its end settles what it did."""
        expected = self._dispatcher.expected_output_tokens
        num_tokens = prepared.num_prompt_tokens + sum(min(r.sampling.max_tokens, expected) for r in prepared.requests)
        self.tenants.limits(stream.tenant).take_tokens(num_tokens, _now_ms())
        stream.tokens_taken = num_tokens

    def _on_stream_end(self, stream: RequestStream) -> None:
        self._dispatcher.release(stream)
        usage = stream.usage()
        self.tenants.limits(stream.tenant).leave(
            _now_ms(),
            tokens_taken=stream.tokens_taken,
            tokens_used=usage.prompt_tokens + usage.completion_tokens if stream.accepted else 0,
        )
        if stream.accepted:
            record = stream.record()
            for observer in self._observers:
                observer.on_request_end(record)

    def _refuse(self, stream: RequestStream, error: BaseException) -> None:
        stream.refuse()
        if self._tracing is not None:
            self._tracing.refused(stream.request_id, error)


def _now_ms() -> float:
    return time.monotonic() * 1000
