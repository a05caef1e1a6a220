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
from typing import Any

from .. import __version__
from ..common.cluster_state import ClusterState, ModelCard
from ..common.config import ServeConfig
from ..common.errors import Cancelled, InvalidRequest, ModelNotFound, PilotfishError, Unavailable
from ..text.prepare import check_request_id
from .dispatcher import Dispatcher
from .events import Event, Observer
from .fleet import Fleet
from .front_end import FrontEnd, Tokenization
from .journal import Journal
from .sequence_state import Received
from .stream_table import StreamTable
from .streams import RequestStream, StreamReader


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
        journal: Journal,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._config = config
        self._front_end = front_end
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._observers = observers
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
        resumable: bool = False,
    ) -> RequestHandle:
        """Accept a request: either `prompt` (text or token ids) or chat `messages`.

        Args:
            request_id: 1 to 128 printable ASCII characters without '#'; one in flight is refused; None makes one.
            sampling: only the fields of SamplingParams that the caller set; the served defaults fill the rest.
            model: the served name, or empty.
            timeout_s: until the last token; None is the configured default.
            echo: the text of every choice starts with the prompt.
            resumable: a reader that leaves does not end it (see `resume`), and it survives this controller.

        Raises:
            InvalidRequest, ModelNotFound, Overloaded (with retry_after_s), Unavailable (no replica can take it),
            DeadlineExceeded: before any event.
        """
        try:
            stream = self._accept(
                request_id=request_id, model=model, priority=priority, timeout_s=timeout_s, resumable=resumable
            )
        except PilotfishError as error:
            self._report_refused(error)
            raise
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
            self._streams.start(stream, prepared)
            self._dispatcher.enqueue(stream)
        except PilotfishError as error:
            stream.refuse()
            self._report_refused(error)
            raise
        except BaseException:
            stream.refuse()
            raise
        finally:
            self._num_preparing -= 1
        self._num_requests += 1
        return RequestHandle(stream, stream.read())

    def resume(self, request_id: str, received: Sequence[Received]) -> RequestHandle:
        """Go on reading a resumable request behind what its client has of each choice.

        Raises:
            RequestNotFound: it ended more than `resume_window_s` ago, was not resumable, or is not of this server.
            InvalidRequest: the client has what this answer does not have.
        """
        return RequestHandle(*self._streams.resume(request_id, received))

    def restore(self) -> None:
        """Take up the requests of an earlier controller, which wait for their clients then."""
        self._streams.restore(self._front_end)

    async def abort(self, request_id: str) -> bool:
        """End a request; its reader gets Cancelled. False if none in flight has this id."""
        stream = self._streams.get(request_id)
        if stream is None:
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
        return ClusterState(
            version=__version__,
            model=self._config.model.name,
            uptime_s=time.time() - self._started_unix_s,
            replicas=self._fleet.statuses(),
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

    def close(self) -> None:
        """Refuse new requests from now on."""
        self._is_closed = True

    def end_all(self) -> None:
        """End what is still in flight."""
        for stream in self._streams.in_flight():
            stream.fail(Unavailable("the server is shutting down"))
        self._streams.close()

    def _accept(
        self, *, request_id: str | None, model: str, priority: int, timeout_s: float | None, resumable: bool
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
        self._dispatcher.check_room(self._num_preparing)
        return self._streams.add(request_id, timeout_s=timeout_s, resumable=resumable)

    def _check_model(self, model: str) -> None:
        served = self._config.model.name
        if model not in ("", served):
            raise ModelNotFound(f"the model {model!r} is not served here; the model served is {served!r}")

    def _on_stream_end(self, stream: RequestStream) -> None:
        self._dispatcher.release(stream)
        if stream.accepted:
            record = stream.record()
            for observer in self._observers:
                observer.on_request_end(record)

    def _report_refused(self, error: PilotfishError) -> None:
        for observer in self._observers:
            observer.on_refused(error.code)
