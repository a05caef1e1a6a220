"""The transport-free core of a gateway: what both doors call.

A request goes: front end (text to tokens, off the event loop) -> intake (the controller's queue and router, here or in another
process) -> a replica; its events come back through a RequestHandle. Everything here runs on one event loop.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol

from ..common import logs
from ..common.cluster_state import ClusterState, ModelCard
from ..common.config import ServeConfig
from ..common.errors import Cancelled, InvalidRequest, ModelNotFound, PilotfishError
from ..common.requests import WorkerInfo
from ..common.routing import RouteDecision
from ..common.tenants import ANONYMOUS, Tenant
from ..text.prepare import ModelLimits, check_request_id
from .events import Event
from .front_end import FrontEnd, Prepared, Tokenization
from .intake import Arrival
from .sequence_state import Received
from .streams import RequestStream, StreamReader
from .tenants import Tenants

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
        self._events: deque[Event] = deque()  # read and not given out by the iterator

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    def cancel(self) -> None:
        """End the request if it has not ended; its worker is told at once. May be called again."""
        self._stream.fail(Cancelled(f"request {self.request_id} was cancelled"))

    def __aiter__(self) -> RequestHandle:
        return self

    async def __anext__(self) -> Event:
        if not self._events:
            try:
                self._events.extend(await self._reader.next_events())
            except BaseException:
                self._leave()
                raise
        if not self._events:
            raise StopAsyncIteration
        return self._events.popleft()

    @property
    def reader(self) -> StreamReader:
        """For who does not iterate, inside of `async with`."""
        return self._reader

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


class ToController(Protocol):
    """The service's way to the controller: its Intake where both are one process, else a RemoteIntake."""

    @property
    def tenants(self) -> Tenants: ...
    async def admit(self, arrival: Arrival, prepare: Callable[[], Awaitable[Prepared]]) -> RequestStream: ...
    def report_refused(self, error: PilotfishError) -> None: ...
    async def resume(
        self, request_id: str, received: Sequence[Received], *, tenant: Tenant
    ) -> tuple[RequestStream, StreamReader]: ...
    async def abort(self, request_id: str, *, tenant: Tenant) -> bool: ...
    def limits(self) -> ModelLimits: ...
    def info(self) -> WorkerInfo | None: ...
    def status(self) -> ClusterState: ...
    @property
    def is_serving(self) -> bool: ...
    async def explain_route(self, request_id: str) -> tuple[RouteDecision, ...]: ...


class InferenceService:
    """Answers requests for the one model that is served."""

    def __init__(self, *, config: ServeConfig, front_end: FrontEnd, intake: ToController) -> None:
        self._config = config
        self._front_end = front_end
        self._intake = intake
        self._started_unix_s = time.time()
        self.tenants = intake.tenants
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
        is_more: bool = False,
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
            is_more: of a call whose first request was let in: neither a full queue nor its tenant's number of requests refuses
                it.

        Raises:
            InvalidRequest, ModelNotFound, Overloaded (with retry_after_s), Unavailable (no replica can take it),
            DeadlineExceeded: before any event.
        """
        try:
            arrival = self._arrival(
                request_id=request_id,
                model=model,
                priority=priority,
                timeout_s=timeout_s,
                tenant=tenant,
                retry_key=retry_key,
                resumable=resumable,
                is_more=is_more,
                trace_headers=trace_headers,
            )
        except PilotfishError as error:
            self._intake.report_refused(error)
            raise
        logs.request_id.set(arrival.request_id)

        async def prepare() -> Prepared:
            info = self._intake.info()
            return await self._front_end.prepare(
                request_id=arrival.request_id,
                prompt=prompt,
                messages=messages,
                continue_final_message=continue_final_message,
                sampling=sampling,
                limits=self._intake.limits(),
                priority=priority,
                salt=self.tenants.cache_salt(tenant),
                version=info.model_version if info else "",
                with_prompt_text=echo,
                timeout_s=arrival.timeout_s,
            )

        stream = await self._intake.admit(arrival, prepare)
        return RequestHandle(stream, stream.read())

    async def resume(self, request_id: str, received: Sequence[Received], *, tenant: Tenant = ANONYMOUS) -> RequestHandle:
        """Go on reading a resumable request behind what its client has of each choice.

        Raises:
            RequestNotFound: it ended more than `resume_window_s` ago, was not resumable, or is not of this server
                or not of this tenant.
            InvalidRequest: the client has what this answer does not have.
        """
        stream, reader = await self._intake.resume(request_id, received, tenant=tenant)
        logs.request_id.set(request_id)
        return RequestHandle(stream, reader)

    async def abort(self, request_id: str, *, tenant: Tenant = ANONYMOUS) -> bool:
        """End a request; its reader gets Cancelled. False if this tenant has none in flight of this id."""
        return await self._intake.abort(request_id, tenant=tenant)

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
        info = self._intake.info()
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
        """The cluster, as seen through these doors."""
        return replace(
            self._intake.status(),
            sampling_defaults=self._front_end.sampling_defaults,
            grpc_address=self.addresses.grpc,
            http_address=self.addresses.http,
        )

    @property
    def is_serving(self) -> bool:
        """Whether requests are taken. Raises Unavailable: the controller is away."""
        self._intake.status()
        return self._intake.is_serving

    async def explain_route(self, request_id: str, *, tenant: Tenant = ANONYMOUS) -> tuple[RouteDecision, ...]:
        """The router's choices for a request that runs or has ended not long ago, oldest first.

        Empty where none is kept, and for another tenant's request unless `tenant` is an operator.
        """
        sees_all = self.tenants.is_operator(tenant)
        return tuple(d for d in await self._intake.explain_route(request_id) if sees_all or d.tenant == tenant.name)

    def _arrival(self, *, request_id: str | None, model: str, timeout_s: float | None, priority: int, **rest: Any) -> Arrival:
        self._check_model(model)
        request_id = request_id or f"req-{uuid.uuid4().hex[:16]}"
        check_request_id(request_id)
        if not -(2**31) <= priority < 2**31:
            raise InvalidRequest(f"priority must fit 32 bits, not {priority}")
        timeout_s = self._config.gateway.default_timeout_s if timeout_s is None else timeout_s
        if not 0 < timeout_s < 1e9:
            raise InvalidRequest(f"the timeout must be a positive number of seconds, not {timeout_s!r}")
        return Arrival(request_id=request_id, timeout_s=timeout_s, priority=priority, **rest)

    def _check_model(self, model: str) -> None:
        served = self._config.model.name
        if model not in ("", served):
            raise ModelNotFound(f"the model {model!r} is not served here; the model served is {served!r}")
