"""A gateway process's way to the controller: the Intake of its service, over a ControllerLink.

Here are the requests that this gateway's clients read now, with their text; what they are beyond that (queue, limits, journal,
the time they may go on without a reader) is the controller's. When the controller is gone they stay, and the next one is told
of each with the tokens that are here; clients see a pause. A client that comes back (Resume) gets its request from the
controller, whichever gateway had it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..common.cluster_state import ClusterState
from ..common.config import ServeConfig
from ..common.errors import Cancelled, InternalError, Overloaded, PilotfishError, Unavailable
from ..common.requests import WorkerInfo
from ..common.routing import RouteDecision
from ..common.tenants import Tenant
from ..proto import gateway_pb2 as pb
from ..proto import inference_pb2 as inference
from ..proto.cluster_codec import status_from_proto
from ..proto.codec import finish_reason_to_proto
from ..proto.gateway_codec import Row, failure_from_proto, failure_to_proto, rows
from ..proto.routing_codec import decision_from_proto
from ..text.prepare import ModelLimits
from .choice_text import MakeText
from .controller_link import WAIT_S, ControllerLink
from .front_end import Prepared
from .intake import Arrival
from .journal import entry_of, prepared_of
from .outlet import Outlet
from .sequence_state import Received
from .streams import RequestStream, StreamReader
from .tenants import Tenants

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 5.0
_AWAY_TIMEOUT_S = 60.0
_MAX_PREPARING = 4096
_TRACE_HEADERS = ("traceparent", "tracestate")
_STARTING = "the controller has not said yet what it serves; try again in a moment"


@dataclass(slots=True)
class _Request:
    """`taken` is set when the controller has it. `submit` is what it was told of it, and is told again after a break."""

    taken: asyncio.Future[None]
    stream: RequestStream | None = None
    submit: pb.GatewaySubmit | None = None
    is_over: bool = False  # for the controller: it need not be told the end

    def settle(self, error: PilotfishError | None) -> None:
        """Who waits to hear that the controller has it waits no longer."""
        if self.taken.done():
            return
        if error is None:
            self.taken.set_result(None)
        else:
            self.taken.set_exception(error)
            self.taken.exception()  # there may be nobody who waits


class RemoteIntake:
    """See the module's docstring. It is a ToController (service.py) and a LinkListener."""

    def __init__(self, config: ServeConfig, link: ControllerLink, *, make_text: MakeText) -> None:
        self._config = config
        self._link = link
        self._make_text = make_text
        self._outlet = Outlet()
        self._requests: dict[int, _Request] = {}
        self._last_number = 0
        self._num_preparing = 0
        self._view: pb.ClusterView | None = None
        self._info: WorkerInfo | None = None
        self._limits: ModelLimits | None = None
        self._unavailable: PilotfishError = Unavailable(_STARTING, retry_after_s=1.0)
        self._away_timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.tenants = Tenants(config.tenants, isolate_cache=config.gateway.isolate_cache)
        self.changed = asyncio.Event()

    # For the service.

    async def admit(self, arrival: Arrival, prepare: Callable[[], Awaitable[Prepared]]) -> RequestStream:
        """See `Intake.admit`."""
        self._num_preparing += 1
        try:
            try:
                self._check_open()
                await self._link.wait_connected(WAIT_S)
            except PilotfishError as error:
                self.report_refused(error)
                raise
            number, request = self._new()
            stream = request.stream = RequestStream(
                request_id=arrival.request_id,
                model=self._config.model.name,
                timeout_s=arrival.timeout_s,
                on_end=partial(self._on_end, number),
                outlet=self._outlet,
                tenant=arrival.tenant,
                is_resumable=arrival.resumable,
            )
            try:
                await self._prepare(number, stream, arrival, prepare)
                await request.taken
            except BaseException:
                stream.refuse()
                raise
        finally:
            self._num_preparing -= 1
        return stream

    async def _prepare(
        self, number: int, stream: RequestStream, arrival: Arrival, prepare: Callable[[], Awaitable[Prepared]]
    ) -> None:
        """Make tokens of it, and tell the controller."""
        try:
            try:
                prepared = await prepare()
            except TimeoutError:
                stream.expire()
            if stream.error is not None:
                raise stream.error
        except PilotfishError as error:
            self.report_refused(error)
            raise
        stream.start(prepared)
        submit = self._requests[number].submit = pb.GatewaySubmit(
            number=number,
            entry=entry_of(stream, prepared),
            prompt_hashes=prepared.prompt_hashes,
            model_version=prepared.version,
            timeout_s=arrival.timeout_s,
            age_s=stream.age_s,
            resumable=arrival.resumable,
            is_more=arrival.is_more,
            retry_key=arrival.retry_key,
            trace_headers={name: arrival.trace_headers[name] for name in _TRACE_HEADERS if name in arrival.trace_headers},
        )
        if self._link.is_connected:  # else the next greeting says it
            self._link.outgoing.submits.append(submit)
            self._link.send()

    def report_refused(self, error: PilotfishError) -> None:
        """A request came to nothing here: the controller counts it."""
        if self._link.is_connected:
            self._link.outgoing.refused[error.code] += 1
            self._link.send()

    async def resume(
        self, request_id: str, received: Sequence[Received], *, tenant: Tenant
    ) -> tuple[RequestStream, StreamReader]:
        """See `InferenceService.resume`."""
        self._check_open()
        await self._link.wait_connected(WAIT_S)
        number, request = self._new()
        choices = [pb.ChoiceSoFar(token_ids=choice.token_ids) for choice in received]
        self._link.outgoing.resumes.add(number=number, request_id=request_id, tenant=tenant.name, choices=choices)
        self._link.send()
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                await request.taken
            assert request.stream is not None
            return request.stream, request.stream.read(request.stream.positions_after(received))
        except BaseException as error:
            if request.stream is not None:
                request.stream.wait_for_reader()  # there is none: it goes back to the controller
            self._requests.pop(number, None)
            if isinstance(error, TimeoutError):
                raise Unavailable("the controller does not answer; try again in a moment", retry_after_s=1.0) from None
            raise

    async def abort(self, request_id: str, *, tenant: Tenant) -> bool:
        """See `InferenceService.abort`."""
        request = pb.GatewayAbortRequest(request_id=request_id, tenant=tenant.name)
        return bool((await self._link.call("Abort", request)).found)

    async def explain_route(self, request_id: str) -> tuple[RouteDecision, ...]:
        """See `InferenceService.explain_route`."""
        response = await self._link.call("ExplainRoute", inference.ExplainRouteRequest(request_id=request_id))
        return tuple(map(decision_from_proto, response.decisions))

    async def render_metrics(self) -> tuple[bytes, str]:
        """The controller's: see `Metrics.render`."""
        response = await self._link.call("Metrics", pb.MetricsRequest())
        return response.content, response.media_type

    def limits(self) -> ModelLimits:
        """As the controller last said. Raises Unavailable: what it said, or that it has not said anything yet.

        A controller that was restarted and has not found its workers yet can take requests: they wait in its queue.
        """
        if self._limits is None:
            raise self._unavailable
        return self._limits

    def info(self) -> WorkerInfo | None:
        """The facts of one replica's worker, or of the last one where there is none now; None before any has started."""
        return self._info

    def status(self) -> ClusterState:
        """As the controller last said, a second ago at most. Raises Unavailable: it is away."""
        if self._view is None or not self._link.is_connected:
            raise Unavailable("the controller cannot be reached; it is probably being restarted", retry_after_s=1.0)
        return status_from_proto(self._view.status)

    @property
    def is_serving(self) -> bool:
        """Whether a replica takes requests, as the controller last said."""
        return self._view is not None and self._view.is_serving

    def close(self) -> None:
        """Refuse new requests from now on."""
        self._is_closed = True

    # For the link.

    def on_connected(self) -> None:
        """Tell this controller, which may be a new one, what is in flight here."""
        if self._away_timer is not None:
            self._away_timer.cancel()
            self._away_timer = None
        num_again = 0
        for request in self._requests.values():
            stream, submit = request.stream, request.submit
            if stream is None or submit is None or stream.ended:
                continue
            num_again += 1
            submit.again, submit.age_s = True, stream.age_s
            del submit.choices[:]
            for sequence in stream.sequences:
                submit.choices.add(
                    token_ids=sequence.output_token_ids,
                    finish_reason=finish_reason_to_proto(sequence.finish_reason),
                    stop_reason=sequence.stop_reason,
                )
            self._link.outgoing.submits.append(submit)
        if num_again:
            logger.warning("%d requests go on with the controller that is connected now", num_again)
            self._link.send()

    def on_disconnected(self) -> None:
        """What waits for an answer of this connection does not get it; the rest has time."""
        for request in list(self._requests.values()):
            if request.submit is None and request.stream is None and not request.taken.done():
                request.settle(Unavailable("the connection to the controller broke", retry_after_s=0.1))
        if self._away_timer is None and self._requests:
            self._away_timer = asyncio.get_running_loop().call_later(_AWAY_TIMEOUT_S, self._give_up)

    def take(self, tick: pb.ControllerTick) -> None:
        if tick.HasField("cluster"):
            self._look(tick.cluster)
        for taken in tick.taken:
            if (request := self._requests.get(taken.number)) is not None:
                self._on_taken(request, taken)
        for row in rows(tick.outputs):
            request = self._requests.get(row.number)
            if request is not None and request.stream is not None and not request.stream.ended:
                self._on_row(request.stream, row)
        for ended in tick.ended:
            if (request := self._requests.get(ended.number)) is not None:
                request.is_over = True
                self._fail(request, failure_from_proto(ended.failure))

    def _look(self, view: pb.ClusterView) -> None:
        self._view = view
        self._info = next((replica.info for replica in status_from_proto(view.status).replicas if replica.info), self._info)
        self.changed.set()
        if view.HasField("limits"):
            self._limits = ModelLimits(
                max_model_len=view.limits.max_model_len,
                vocab_size=view.limits.vocab_size,
                kv_capacity_tokens=view.limits.kv_capacity_tokens,
            )
            return
        self._unavailable = failure_from_proto(view.unavailable)
        if self._unavailable.retry_after_s is None:  # there will be no replica any more
            self._limits = None

    def _on_taken(self, request: _Request, taken: pb.StreamTaken) -> None:
        if taken.HasField("entry"):
            entry = taken.entry
            stream = RequestStream(
                request_id=entry.request_id,
                model=entry.model,
                timeout_s=taken.timeout_s,
                on_end=partial(self._on_end, taken.number),
                outlet=self._outlet,
                tenant=self.tenants.named(entry.tenant),
                is_resumable=True,
                age_s=taken.age_s,
            )
            stream.created_unix_s = entry.created_unix_s
            stream.start(prepared_of(entry, make_text=self._make_text, block_size=None))
            request.stream = stream
            request.submit = pb.GatewaySubmit(number=taken.number, entry=entry, timeout_s=taken.timeout_s, resumable=True)
        request.settle(None)

    def _on_row(self, stream: RequestStream, row: Row) -> None:
        sequence = stream.sequences[row.choice]
        if row.run is not None:
            run = row.run
            stream.note_run(sequence, replica=run.replica, num_attempts=run.num_attempts, queue_ms=run.queue_ms)
        if sequence.finish_reason is not None:  # by a stop string, of which the controller did not know yet
            return
        try:
            is_stopped = stream.apply(sequence, row.output)
        except InternalError as error:
            stream.fail(error)
            return
        if is_stopped:
            self._link.outgoing.stopped.add(
                number=row.number,
                choice=row.choice,
                num_tokens=len(sequence.output_token_ids),
                stop_reason=sequence.stop_reason,
            )
            self._link.send()

    def _on_end(self, number: int, stream: RequestStream) -> None:
        request = self._requests.pop(number, None)
        if request is None:
            return
        request.settle(stream.error)
        was_told = request.submit is not None and self._link.is_connected
        is_complete = stream.error is None and stream.accepted
        if request.is_over or is_complete or not was_told:
            return
        error = stream.error or Cancelled(f"request {stream.request_id} was cancelled")
        self._link.outgoing.ended.add(number=number, failure=failure_to_proto(error), left=stream.was_left)
        self._link.send()

    def _fail(self, request: _Request, error: PilotfishError) -> None:
        request.settle(error)
        if request.stream is not None:
            request.stream.fail(error)

    def _give_up(self) -> None:
        """No controller has come."""
        error = Unavailable(f"the controller has been away for {_AWAY_TIMEOUT_S:g} s")
        for request in list(self._requests.values()):
            self._fail(request, error)

    def _new(self) -> tuple[int, _Request]:
        self._last_number += 1
        request = self._requests[self._last_number] = _Request(asyncio.get_running_loop().create_future())
        return self._last_number, request

    def _check_open(self) -> None:
        if self._is_closed:
            raise Unavailable("the server is shutting down")
        if self._num_preparing > _MAX_PREPARING:
            raise Overloaded(f"{self._num_preparing} requests are on their way to the controller", retry_after_s=1.0)
