"""`AsyncClient`: the SDK for asyncio. client.py has its twin for threads, with the same methods."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Unpack

import grpc

from ..common.cluster_state import ClusterState, ModelCard
from ..common.errors import Cancelled, Unavailable
from ..common.routing import RouteDecision
from ..proto import inference_pb2 as pb
from ..proto.cluster_codec import card_from_proto, status_from_proto
from ..proto.inference_pb2_grpc import InferenceStub
from ..proto.routing_codec import decision_from_proto
from .async_text_stream import AsyncTextStream, is_task_cancelled
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
from .tracing import Metadata, traced

_END_TIMEOUT_S = 2.0


class AsyncClient:
    """Talks to a pilotfish server over gRPC, from one event loop::

        async with AsyncClient("127.0.0.1:50051") as client:
            completion = await client.generate("The capital of France is", max_tokens=8, temperature=0)
            async for delta in client.stream_chat("Explain gravity in one sentence."):
                print(delta.text, end="", flush=True)

    Arguments, sampling parameters and errors are those of `Client`. Cancelling a task ends the call it waits for, and the
    server stops working on it. May be made before its event loop runs; the first call binds it to that loop.
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
        self._is_closed = False
        self._arguments = [channel.arguments(address=door, tls=tls) for door in self._doors.addresses]
        self._credentials = None if tls is None else tls.credentials()
        self._streams: weakref.WeakSet[AsyncTextStream] = weakref.WeakSet()
        self._ending: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channels: list[Any] = []
        self._stubs: list[Any] = []

    @property
    def address(self) -> str:
        """Where the next request begins."""
        return self._doors.addresses[self._doors.preferred]

    async def generate(
        self, prompt: str | Sequence[int], params: Params | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Continue a prompt, text or token ids; returns when the answer is whole.

        Options: sampling parameters, `model`, `timeout_s`, `priority`, `request_id`, `echo`; see `GenerateOptions`.
        """
        return await self.stream_generate(prompt, params, **options).read_all()

    def stream_generate(
        self, prompt: str | Sequence[int], params: Params | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncTextStream:
        """As `generate`, but to iterate with `async for`: the text as it is produced."""
        return self._stream(generate_call(prompt, params, options))

    async def chat(self, messages: Messages, params: Params | None = None, **options: Unpack[ChatOptions]) -> Completion:
        """Answer a conversation through the model's chat template; returns when the answer is whole.

        `messages` are objects with `role` and `content`, oldest first; a string alone is one message of the user.
        Options: sampling parameters, `model`, `timeout_s`, `priority`, `request_id`, `continue_final_message`; see
        `ChatOptions`.
        """
        return await self.stream_chat(messages, params, **options).read_all()

    def stream_chat(self, messages: Messages, params: Params | None = None, **options: Unpack[ChatOptions]) -> AsyncTextStream:
        """As `chat`, but to iterate with `async for`: the text as it is produced."""
        return self._stream(chat_call(messages, params, options))

    async def abort(self, request_id: str) -> bool:
        """End a request, whoever made it. False if none in flight has this id."""
        found: bool = (await self._short_call("Abort", pb.AbortRequest(request_id=request_id))).found
        return found

    async def tokenize(self, text: Messages, *, model: str = "", add_special_tokens: bool = True) -> Tokenization:
        """Token ids of a text, or of chat messages through the model's template (then `add_special_tokens` has no meaning)."""
        request = tokenize_request(text, model=model, add_special_tokens=add_special_tokens)
        response = await self._short_call("Tokenize", request)
        return Tokenization(token_ids=tuple(response.token_ids), tokens=tuple(response.tokens))

    async def models(self) -> tuple[ModelCard, ...]:
        """What is served."""
        return tuple(map(card_from_proto, (await self._short_call("ListModels", pb.ListModelsRequest())).models))

    async def status(self) -> ClusterState:
        """The cluster at this moment: replicas, load, sampling defaults, addresses."""
        return status_from_proto(await self._short_call("ClusterStatus", pb.ClusterStatusRequest()))

    async def explain_route(self, request_id: str) -> tuple[RouteDecision, ...]:
        """Why a request went where it went: the router's choices for it, one for each of its choices and each replica it lost,
        oldest first. Empty where the server keeps none: the id is unknown, still queued, or too long ago."""
        response = await self._short_call("ExplainRoute", pb.ExplainRouteRequest(request_id=request_id))
        return tuple(map(decision_from_proto, response.decisions))

    async def aclose(self) -> None:
        """End the connection; calls that run get Cancelled, and the server is told to stop working on them."""
        for stream in list(self._streams):
            await stream.aclose()
        self._is_closed = True
        if self._ending:
            await asyncio.wait(list(self._ending), timeout=_END_TIMEOUT_S)
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _stream(self, call: TextCall) -> AsyncTextStream:
        attempts = self._attempts(self._timeout_s if call.timeout_s is None else call.timeout_s)
        begin = traced(partial(self._begin, attempts), address=self.address, metadata=(*self._metadata, call_metadata()))
        stream = AsyncTextStream(begin, self._end_request, attempts, call)
        self._streams.add(stream)
        return stream

    def _end_request(self, request_id: str) -> None:
        """Tell the server that nobody waits for an answer. Where that fails it runs on for `resume_window_s` and ends then."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._begin_end, request_id)

    def _begin_end(self, request_id: str) -> None:
        async def abort() -> None:
            with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
                attempts = self._attempts(_END_TIMEOUT_S)
                await self._begin(attempts, "Abort", pb.AbortRequest(request_id=request_id), _END_TIMEOUT_S, self._metadata)

        if not self._is_closed:
            task = asyncio.get_running_loop().create_task(abort())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _short_call(self, method: str, request: Any) -> Any:
        attempts = self._attempts(self._short_timeout_s)
        while True:
            try:
                answer = await self._begin(attempts, method, request, attempts.remaining_s(), self._metadata)
                attempts.progressed()
                return answer
            except asyncio.CancelledError:
                if is_task_cancelled():
                    raise
                raise Cancelled("the call was ended by this client") from None
            except grpc.RpcError as failure:
                delay_s = attempts.delay_after(failure)
            await asyncio.sleep(delay_s)

    def _begin(self, attempts: Attempts, method: str, request: Any, timeout_s: float | None, metadata: Metadata) -> Any:
        if self._is_closed:
            raise Unavailable("this client is closed")
        if not self._stubs:
            self._loop = asyncio.get_running_loop()
            self._channels = list(map(self._open, self._doors.addresses, self._arguments))
            self._stubs = [InferenceStub(channel) for channel in self._channels]  # type: ignore[no-untyped-call]
        return getattr(self._stubs[attempts.door], method)(request, timeout=timeout_s, metadata=metadata)

    def _open(self, address: str, arguments: list[tuple[str, str | int]]) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=arguments)
        return grpc.aio.secure_channel(address, self._credentials, options=arguments)

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(doors=self._doors, policy=self._retry, timeout_s=timeout_s, is_closed=lambda: self._is_closed)
