"""The transport-free core of the controller: what both gateways call.

A request goes: front end (text to tokens, off the event loop) -> dispatcher (queue, router) -> a replica; its events come back
through a RequestHandle. Everything here runs on the controller's one event loop.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..common import logs
from ..common.cluster_state import ClusterState, ModelCard
from ..common.config import ServeConfig
from ..common.errors import Cancelled, InvalidRequest, ModelNotFound, PilotfishError, Unavailable
from ..common.routing import RouteDecision
from ..common.tenants import ANONYMOUS, Tenant
from ..text.prepare import check_request_id
from .dispatcher import Dispatcher
from .events import Event, Observer
from .fleet import Fleet
from .front_end import FrontEnd, Prepared, Tokenization
from .journal import Journal
from .sequence_state import Received
from .stream_table import StreamTable
from .streams import RequestStream, StreamReader
from .tenants import Tenants
from .totals import Totals

if TYPE_CHECKING:
    from .tracing import RequestTracing

NO_HEADERS: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where the gateways listen, "host:port"."""

    grpc: str = ""
    http: str = ""


class RequestHandle:
    """The events of one request: `async with handle: async for event in handle`. Typed errors are raised from the iterator.

    Leaving the `async with`, or cancelling the task that waits for the next event, ends the request on its worker; one that is
    resumable runs on for a while then, in which `InferenceService.resume` takes it up. `cancel()` ends any at once.
    """

    def __init__(self, stream: RequestStream, reader: StreamReader) -> None:
        self._stream = stream
        self._reader = reader

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    def cancel(self) -> None:
        """End the request if it has not ended; its worker is told at once. May be called again."""
        self._stream.fail(Cancelled(f"request {self.request_id} was cancelled"))

    def __aiter__(self) -> RequestHandle:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await self._reader.next_event()
        except BaseException:
            self._leave()
            raise
        if event is None:
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        self._leave()

    async def __aenter__(self) -> RequestHandle:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._stream.leave(self._reader)


class InferenceService:
    """Answers requests for the one model that is served."""

    def __init__(
        self,
        *,
        config: ServeConfig,
        front_end: FrontEnd,
        fleet: Fleet,
        dispatcher: Dispatcher,
        totals: Totals,
        journal: Journal,
        tracing: RequestTracing | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._config = config
        self._front_end = front_end
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._totals = totals
        self._tracing = tracing
        self._observers = observers
        self.tenants = Tenants(config.tenants)
        self._streams = StreamTable(
            model=config.model.name,
            dispatcher=dispatcher,
            journal=journal,
            window_s=config.gateway.resume_window_s,
            on_end=self._on_stream_end,
        )
        self._num_preparing = 0
        self._num_requests = 0
        self._started_unix_s = time.time()
        self._is_closed = False
        self.addresses = Addresses()

    async def start_request(
        self,
        *,
        request_id: str | None = None,
        prompt: str | Sequence[int] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        sampling: Mapping[str, Any],
        model: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        continue_final_message: bool = False,
        echo: bool = False,
        tenant: Tenant = ANONYMOUS,
        retry_key: str = "",
        trace_headers: Mapping[str, str] = NO_HEADERS,
        resumable: bool = False,
    ) -> RequestHandle:
        """Accept a request: either `prompt` (text or token ids) or chat `messages`.

        Args:
            request_id: 1 to 128 printable ASCII characters without '#'; one in flight is refused; None makes one.
            sampling: only the fields of SamplingParams that the caller set; the served defaults fill the rest.
            model: the served name, or empty.
            timeout_s: until the last token; None is the configured default.
            echo: the text of every choice starts with the prompt.
            tenant: whose request it is (`tenants.authenticate`).
            retry_key: names the caller over several attempts of one call, for the place that a full queue holds for it.
            trace_headers: W3C `traceparent` and `tracestate`, where the caller traces; read only where this controller does.
            resumable: a reader that leaves does not end it (see `resume`), and it survives this controller.

        Raises:
            InvalidRequest, ModelNotFound, Overloaded (with retry_after_s), Unavailable (no replica can take it),
            DeadlineExceeded: before any event.
        """
        try:
            stream = self._accept(
                request_id=request_id,
                model=model,
                priority=priority,
                timeout_s=timeout_s,
                tenant=tenant,
                retry_key=retry_key,
                resumable=resumable,
            )
        except PilotfishError as error:
            self._report_refused(error)
            raise
        logs.request_id.set(stream.request_id)
        if self._tracing is not None:
            self._tracing.begin(stream.request_id, stream.model, trace_headers)
        self._num_preparing += 1
        try:
            prepared = await self._front_end.prepare(
                request_id=stream.request_id,
                prompt=prompt,
                messages=messages,
                continue_final_message=continue_final_message,
                sampling=sampling,
                limits=self._fleet.limits(),
                priority=priority,
                with_prompt_text=echo,
            )
            if stream.error is not None:  # aborted or out of time meanwhile
                raise stream.error
            self._take_tokens(stream, prepared)
            self._streams.start(stream, prepared)
            if self._tracing is not None:
                self._tracing.accepted(
                    stream.request_id, num_prompt_tokens=prepared.num_prompt_tokens, num_choices=len(prepared.requests)
                )
            self._dispatcher.enqueue(stream, retry_key=retry_key)
        except PilotfishError as error:
            self._refuse(stream, error)
            self._report_refused(error)
            raise
        except BaseException as error:
            self._refuse(stream, error)
            raise
        finally:
            self._num_preparing -= 1
        self._num_requests += 1
        return RequestHandle(stream, stream.read())

    def resume(self, request_id: str, received: Sequence[Received], *, tenant: Tenant = ANONYMOUS) -> RequestHandle:
        """Go on reading a resumable request behind what its client has of each choice.

        Raises:
            RequestNotFound: it ended more than `resume_window_s` ago, was not resumable, or is not of this server
                or not of this tenant.
            InvalidRequest: the client has what this answer does not have.
        """
        return RequestHandle(*self._streams.resume(request_id, received, tenant=tenant))

    def restore(self) -> None:
        """Take up the requests of an earlier controller, which wait for their clients then."""
        for stream in self._streams.restore(self._front_end, self.tenants.named):
            self.tenants.limits(stream.tenant).enter_again(_now_ms())

    async def abort(self, request_id: str, *, tenant: Tenant = ANONYMOUS) -> bool:
        """End a request; its reader gets Cancelled. False if this tenant has none in flight of this id."""
        stream = self._streams.get(request_id)
        if stream is None or stream.tenant.name != tenant.name:
            return False
        stream.fail(Cancelled(f"request {request_id} was aborted"))
        return True

    async def tokenize(
        self,
        *,
        text: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        model: str = "",
        add_special_tokens: bool = True,
    ) -> Tokenization:
        """The token ids of a text, or of chat messages through the model's template, and the bytes of each token.

        Raises:
            InvalidRequest, ModelNotFound.
        """
        self._check_model(model)
        return await self._front_end.tokenize(text=text, messages=messages, add_special_tokens=add_special_tokens)

    def models(self) -> tuple[ModelCard, ...]:
        """What is served; empty until a replica has started once."""
        info = self._fleet.info()
        if info is None:
            return ()
        return (
            ModelCard(
                name=self._config.model.name,
                architecture=info.architecture,
                max_model_len=info.max_model_len,
                created_unix_s=int(self._started_unix_s),
            ),
        )

    def status(self) -> ClusterState:
        state = ClusterState(
            version=__version__,
            model=self._config.model.name,
            uptime_s=time.time() - self._started_unix_s,
            replicas=tuple(map(self._dispatcher.with_routing, self._fleet.statuses())),
            num_queued=self._dispatcher.num_queued,
            num_running=self._dispatcher.num_running,
            generation_config=self._config.model.generation_config,
            sampling_defaults=self._front_end.sampling_defaults,
            grpc_address=self.addresses.grpc,
            http_address=self.addresses.http,
            num_requests=self._num_requests,
            num_restarts=self._fleet.num_restarts,
            controller_pid=os.getpid(),
        )
        return self._totals.add_to(state)

    def explain_route(self, request_id: str) -> tuple[RouteDecision, ...]:
        """The router's choices for a request that runs or has ended not long ago, oldest first; empty where none is kept."""
        return self._dispatcher.explain(request_id)

    def close(self) -> None:
        """Refuse new requests from now on."""
        self._is_closed = True

    def end_all(self) -> None:
        """End what is still in flight."""
        for stream in self._streams.in_flight():
            stream.fail(Unavailable("the server is shutting down"))
        self._streams.close()

    def _accept(
        self,
        *,
        request_id: str | None,
        model: str,
        priority: int,
        timeout_s: float | None,
        tenant: Tenant,
        retry_key: str,
        resumable: bool,
    ) -> RequestStream:
        if self._is_closed:
            raise Unavailable("the server is shutting down")
        self._check_model(model)
        request_id = request_id or f"req-{uuid.uuid4().hex[:16]}"
        check_request_id(request_id)
        if not -(2**31) <= priority < 2**31:
            raise InvalidRequest(f"priority must fit 32 bits, not {priority}")
        timeout_s = self._config.gateway.default_timeout_s if timeout_s is None else timeout_s
        if not 0 < timeout_s < 1e9:
            raise InvalidRequest(f"the timeout must be a positive number of seconds, not {timeout_s!r}")
        self._streams.check_free(request_id)
        self._dispatcher.check_room(self._num_preparing, tenant=tenant.name, priority=priority, retry_key=retry_key)
        self.tenants.limits(tenant).enter(_now_ms())
        return self._streams.add(request_id, timeout_s=timeout_s, resumable=resumable, tenant=tenant)

    def _take_tokens(self, stream: RequestStream, prepared: Prepared) -> None:
        """Of the tenant's tokens a minute, what the request is expected to use; its end settles what it did."""
        expected = self._dispatcher.expected_output_tokens
        num_tokens = prepared.num_prompt_tokens + sum(min(r.sampling.max_tokens, expected) for r in prepared.requests)
        self.tenants.limits(stream.tenant).take_tokens(num_tokens, _now_ms())
        stream.tokens_taken = num_tokens

    def _check_model(self, model: str) -> None:
        served = self._config.model.name
        if model not in ("", served):
            raise ModelNotFound(f"the model {model!r} is not served here; the model served is {served!r}")

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

    def _report_refused(self, error: PilotfishError) -> None:
        for observer in self._observers:
            observer.on_refused(error.code)


def _now_ms() -> float:
    return time.monotonic() * 1000
