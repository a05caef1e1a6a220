"""`Client`: the SDK for threads. async_client.py has its asyncio twin, with the same methods."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial
from types import TracebackType
from typing import Any, Unpack

import grpc

from ..common.cluster_state import ClusterState, ModelCard
from ..common.errors import Unavailable
from ..common.routing import RouteDecision
from ..proto import inference_pb2 as pb
from ..proto.cluster_codec import card_from_proto, status_from_proto
from ..proto.inference_pb2_grpc import InferenceStub
from ..proto.routing_codec import decision_from_proto
from .attempts import Attempts
from .doors import Doors
from .options import (
    DEFAULT_CHANNEL,
    DEFAULT_RETRY,
    ChannelOptions,
    RetryPolicy,
    TlsOptions,
    call_metadata,
    key_metadata,
)
from .requests import ChatOptions, GenerateOptions, Messages, Params, TextCall, chat_call, generate_call, tokenize_request
from .results import Completion, Tokenization
from .text_stream import TextStream
from .tracing import Metadata, traced

_END_TIMEOUT_S = 2.0


class Client:
    """Talks to a pilotfish server over gRPC::

        with Client("127.0.0.1:50051") as client:
            print(client.generate("The capital of France is", max_tokens=8, temperature=0).text)
            for delta in client.stream_chat("Explain gravity in one sentence."):
                print(delta.text, end="", flush=True)

    Safe to use from many threads at once. They share one connection, made when it is first needed and again after it broke.

    Sampling parameters are keyword arguments (`SamplingOptions`), or `params`: a `SamplingParams` or a mapping; keyword
    arguments win. Only what the caller set is sent, and the server fills in the rest with its own defaults, which
    `status().sampling_defaults` shows. Of a `SamplingParams` that is what differs from the class's defaults: to insist on
    such a default against a server that has others, name it as a keyword argument or in a mapping.

    Every method raises classes of `pilotfish.common.errors`: InvalidRequest, ModelNotFound, Overloaded, DeadlineExceeded,
    Unavailable and so on; the message says what to do.

    Args:
        address: "host:port" of the server's gRPC door, or several of one cluster (of gateways on several machines): where a
            connection breaks, its requests go on through the next one.
        api_key: sent with every call as `authorization: Bearer KEY`; None takes the variable PILOTFISH_API_KEY. Use it with
            `tls`, or anyone on the way can read it.
        tls: encrypt the connection; None sends plain text.
        retry: when a failed call is made again; `RetryPolicy(max_attempts=1)` never does.
        channel: keepalive and message size.
        timeout_s: of requests for text that bring none of their own; None leaves it to the server.
        short_timeout_s: of all other calls.

    Raises:
        ConfigError: the address is no host:port, or a TLS file cannot be read.
    """

    def __init__(
        self,
        address: str | Sequence[str] = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        tls: TlsOptions | None = None,
        retry: RetryPolicy = DEFAULT_RETRY,
        channel: ChannelOptions = DEFAULT_CHANNEL,
        timeout_s: float | None = None,
        short_timeout_s: float = 30.0,
    ) -> None:
        self._doors = Doors.parse(address)
        self._metadata = key_metadata(api_key)
        self._retry = retry
        self._timeout_s = timeout_s
        self._short_timeout_s = short_timeout_s
        self._closed = threading.Event()
        self._streams: weakref.WeakSet[TextStream] = weakref.WeakSet()
        self._ending: set[Future[None]] = set()
        self._channels = [_open(door, tls, channel) for door in self._doors.addresses]
        self._stubs: list[Any] = [InferenceStub(channel) for channel in self._channels]  # type: ignore[no-untyped-call]

    @property
    def address(self) -> str:
        """Where the next request begins."""
        return self._doors.addresses[self._doors.preferred]

    def generate(
        self, prompt: str | Sequence[int], params: Params | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Continue a prompt, text or token ids; returns when the answer is whole.

        Options: sampling parameters, `model`, `timeout_s`, `priority`, `request_id`, `echo`; see `GenerateOptions`.
        """
        return self.stream_generate(prompt, params, **options).read_all()

    def stream_generate(
        self, prompt: str | Sequence[int], params: Params | None = None, **options: Unpack[GenerateOptions]
    ) -> TextStream:
        """As `generate`, but returns at once: iterate to get the text as it is produced."""
        return self._stream(generate_call(prompt, params, options))

    def chat(self, messages: Messages, params: Params | None = None, **options: Unpack[ChatOptions]) -> Completion:
        """Answer a conversation through the model's chat template; returns when the answer is whole.

        `messages` are objects with `role` and `content`, oldest first; a string alone is one message of the user.
        Options: sampling parameters, `model`, `timeout_s`, `priority`, `request_id`, `continue_final_message`; see
        `ChatOptions`.
        """
        return self.stream_chat(messages, params, **options).read_all()

    def stream_chat(self, messages: Messages, params: Params | None = None, **options: Unpack[ChatOptions]) -> TextStream:
        """As `chat`, but returns at once: iterate to get the text as it is produced."""
        return self._stream(chat_call(messages, params, options))

    def abort(self, request_id: str) -> bool:
        """End a request, whoever made it. False if none in flight has this id."""
        found: bool = self._short_call("Abort", pb.AbortRequest(request_id=request_id)).found
        return found

    def tokenize(self, text: Messages, *, model: str = "", add_special_tokens: bool = True) -> Tokenization:
        """Token ids of a text, or of chat messages through the model's template (then `add_special_tokens` has no meaning)."""
        request = tokenize_request(text, model=model, add_special_tokens=add_special_tokens)
        response = self._short_call("Tokenize", request)
        return Tokenization(token_ids=tuple(response.token_ids), tokens=tuple(response.tokens))

    def models(self) -> tuple[ModelCard, ...]:
        """What is served."""
        return tuple(map(card_from_proto, self._short_call("ListModels", pb.ListModelsRequest()).models))

    def status(self) -> ClusterState:
        """The cluster at this moment: replicas, load, sampling defaults, addresses."""
        return status_from_proto(self._short_call("ClusterStatus", pb.ClusterStatusRequest()))

    def explain_route(self, request_id: str) -> tuple[RouteDecision, ...]:
        """Why a request went where it went: the router's choices for it, one for each of its choices and each replica it lost,
        oldest first. Empty where the server keeps none: the id is unknown, still queued, or too long ago."""
        response = self._short_call("ExplainRoute", pb.ExplainRouteRequest(request_id=request_id))
        return tuple(map(decision_from_proto, response.decisions))

    def close(self) -> None:
        """End the connection; calls that run get Cancelled, and the server is told to stop working on them."""
        for stream in list(self._streams):
            stream.close()
        self._closed.set()
        wait(list(self._ending), _END_TIMEOUT_S)
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _stream(self, call: TextCall) -> TextStream:
        attempts = self._attempts(self._timeout_s if call.timeout_s is None else call.timeout_s)
        begin = traced(partial(self._begin, attempts), address=self.address, metadata=(*self._metadata, call_metadata()))
        stream = TextStream(begin, self._end_request, attempts, call)
        self._streams.add(stream)
        return stream

    def _end_request(self, request_id: str) -> None:
        """Tell the server that nobody waits for an answer. Where that fails it runs on for `resume_window_s` and ends then."""
        if self._closed.is_set():
            return
        abort = self._stubs[self._doors.preferred].Abort
        call = abort.future(pb.AbortRequest(request_id=request_id), timeout=_END_TIMEOUT_S, metadata=self._metadata)
        ended: Future[None] = Future()
        self._ending.add(ended)

        def done(_: object) -> None:
            ended.set_result(None)
            self._ending.discard(ended)

        call.add_done_callback(done)

    def _short_call(self, method: str, request: Any) -> Any:
        attempts = self._attempts(self._short_timeout_s)
        while True:
            try:
                answer = self._begin(attempts, method, request, attempts.remaining_s(), self._metadata)
                attempts.progressed()
                return answer
            except grpc.RpcError as failure:
                delay_s = attempts.delay_after(failure)
            self._closed.wait(delay_s)

    def _begin(self, attempts: Attempts, method: str, request: Any, timeout_s: float | None, metadata: Metadata) -> Any:
        if self._closed.is_set():
            raise Unavailable("this client is closed")
        return getattr(self._stubs[attempts.door], method)(request, timeout=timeout_s, metadata=metadata)

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(doors=self._doors, policy=self._retry, timeout_s=timeout_s, is_closed=self._closed.is_set)


def _open(address: str, tls: TlsOptions | None, channel: ChannelOptions) -> grpc.Channel:
    arguments = channel.arguments(address=address, tls=tls)
    if tls is None:
        return grpc.insecure_channel(address, options=arguments)
    return grpc.secure_channel(address, tls.credentials(), options=arguments)
