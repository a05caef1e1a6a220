"""The gRPC door: pilotfish.v1.Inference over an InferenceService, with standard health and reflection.

Requests arrive as bytes and are parsed here, so that malformed ones get the same typed errors as any other. A call's gRPC
deadline is the request's deadline; a cancelled call ends its request. With API keys in the configuration every method of
Inference needs one, in the metadata "authorization: Bearer KEY", and so does reflection; health does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from ..common.config import GatewayConfig
from ..common.errors import ConfigError, InvalidRequest, PilotfishError
from ..common.tenants import Tenant
from ..proto import inference_pb2 as pb
from ..proto.cluster_codec import card_to_proto, status_to_proto
from ..proto.routing_codec import decision_to_proto
from ..text.tokenizer import Tokenizer
from . import grpc_messages
from .call_writer import CallWriter
from .grpc_guard import MAX_CALLS, Context, KeyGuard, abort, cut_off_later, first_message, server_options
from .grpc_health import HealthService
from .service import InferenceService, RequestHandle

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
CALL_ID_KEY = "pilotfish-call-id"
_STOP_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Caller:
    """What a call's context says: whose it is, which call it is (over its attempts), how long it may take, what traces it."""

    tenant: Tenant
    call_id: str
    timeout_s: float | None
    trace_headers: Mapping[str, str]


class GrpcGateway:
    """Owns the gRPC server: `await start()`, then `await stop()`."""

    def __init__(self, service: InferenceService, tokenizer: Tokenizer, config: GatewayConfig) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._config = config
        self._health = HealthService((SERVICE_NAME,), request_timeout_s=config.client_timeout_s)
        self._server = grpc.aio.server(
            options=server_options(config),
            interceptors=(KeyGuard(service.tenants),) if service.tenants.have_keys else None,
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        self._server.add_generic_rpc_handlers((self._handlers(), self._health.handlers()))
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> str:
        """Listen; returns the address.

        Raises:
            ConfigError: the port is in use or the host is not of this machine.
        """
        wanted = f"{self._config.host}:{self._config.grpc_port}"
        try:
            port = self._server.add_insecure_port(wanted)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot serve gRPC on {wanted}: the port is in use or the address is not of this machine; "
                "choose another with --grpc-port (0 takes a free one) or --host"
            ) from error
        await self._server.start()
        return f"{self._config.host}:{port}"

    def set_serving(self, serving: bool) -> None:
        """What the health service answers, for the whole server and for Inference."""
        self._health.set_serving(serving)

    async def stop(self) -> None:
        self._health.close()
        await self._server.stop(_STOP_GRACE_S)

    def _caller(self, context: Context) -> _Caller:
        """Raises Unauthenticated."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        return _Caller(
            tenant=self._service.tenants.authenticate(metadata.get("authorization")),
            call_id=metadata.get(CALL_ID_KEY, ""),
            timeout_s=_time_remaining_s(context),
            trace_headers=_trace_headers(context),
        )

    def _handlers(self) -> grpc.GenericRpcHandler:
        """Each reads its one request itself: the key comes first, and the request in a limited time."""

        def handler(
            cls: type[Message], answer: Callable[[Any, _Caller, Context], Awaitable[None]], *, for_operators: bool = False
        ) -> grpc.RpcMethodHandler:
            async def handle(_messages: AsyncIterator[bytes], context: Context) -> None:
                limit: asyncio.TimerHandle | None = None
                try:
                    caller = self._caller(context)
                    if for_operators:
                        self._service.tenants.check_operator(caller.tenant)
                    if caller.timeout_s is None:  # else gRPC itself ends the call at its deadline
                        limit = cut_off_later(context, self._config.default_timeout_s + self._config.client_timeout_s)
                    data = await first_message(context, timeout_s=self._config.client_timeout_s)
                    await answer(grpc_messages.parse(cls, data), caller, context)
                except (PilotfishError, Exception) as error:  # noqa: BLE001 - a process's edge: logged and answered
                    await abort(context, error)
                finally:
                    if limit is not None:
                        limit.cancel()

            return grpc.stream_stream_rpc_method_handler(handle)

        def stream(cls: type[Message], begin: Callable[[Any, _Caller], Awaitable[RequestHandle]]) -> grpc.RpcMethodHandler:
            async def answer(request: Any, caller: _Caller, context: Context) -> None:
                async with await begin(request, caller) as handle:
                    events = await handle.reader.next_events()
                    if len(events) == 1 and cls is not pb.ResumeRequest and not request.resumable:
                        events += await handle.reader.next_events()  # who cannot come back has no use for the start alone
                    await context.write(grpc_messages.events_to_proto(events, self._tokenizer).SerializeToString())
                    await CallWriter(context, handle.reader, self._tokenizer).run()

            return handler(cls, answer)

        def unary(
            cls: type[Message], method: Callable[[Any, _Caller], Awaitable[Message]], *, for_operators: bool = False
        ) -> grpc.RpcMethodHandler:
            async def answer(request: Any, caller: _Caller, context: Context) -> None:
                await context.write((await method(request, caller)).SerializeToString())

            return handler(cls, answer, for_operators=for_operators)

        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Generate": stream(pb.GenerateRequest, self._generate),
                "Chat": stream(pb.ChatRequest, self._chat),
                "Resume": stream(pb.ResumeRequest, self._resume),
                "Abort": unary(pb.AbortRequest, self._abort_request),
                "Tokenize": unary(pb.TokenizeRequest, self._tokenize),
                "ListModels": unary(pb.ListModelsRequest, self._list_models),
                "ClusterStatus": unary(pb.ClusterStatusRequest, self._cluster_status, for_operators=True),
                "ExplainRoute": unary(pb.ExplainRouteRequest, self._explain_route),
            },
        )

    async def _generate(self, request: pb.GenerateRequest, caller: _Caller) -> RequestHandle:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("prompt is missing: set text or tokens")
        prompt = request.text if kind == "text" else list(request.tokens.ids)
        return await self._begin(request, caller, prompt=prompt, echo=request.echo)

    async def _chat(self, request: pb.ChatRequest, caller: _Caller) -> RequestHandle:
        return await self._begin(
            request,
            caller,
            messages=grpc_messages.messages_from_proto(request.messages),
            continue_final_message=request.continue_final_message,
        )

    async def _begin(self, request: pb.GenerateRequest | pb.ChatRequest, caller: _Caller, **what: Any) -> RequestHandle:
        return await self._service.start_request(
            request_id=request.request_id or None,
            sampling=grpc_messages.sampling_fields(request.sampling),
            model=request.model,
            priority=request.priority,
            timeout_s=caller.timeout_s,
            tenant=caller.tenant,
            retry_key=caller.call_id or request.request_id,
            trace_headers=caller.trace_headers,
            resumable=request.resumable,
            **what,
        )

    async def _resume(self, request: pb.ResumeRequest, caller: _Caller) -> RequestHandle:
        received = grpc_messages.received_from_proto(request.choices)
        return await self._service.resume(request.request_id, received, tenant=caller.tenant)

    async def _abort_request(self, request: pb.AbortRequest, caller: _Caller) -> pb.AbortResponse:
        return pb.AbortResponse(found=await self._service.abort(request.request_id, tenant=caller.tenant))

    async def _tokenize(self, request: pb.TokenizeRequest, _caller: _Caller) -> pb.TokenizeResponse:
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("input is missing: set text or messages")
        result = await self._service.tokenize(
            text=request.text if kind == "text" else None,
            messages=grpc_messages.messages_from_proto(request.messages.messages) if kind == "messages" else None,
            model=request.model,
            add_special_tokens=request.add_special_tokens,
        )
        return pb.TokenizeResponse(token_ids=result.token_ids, tokens=result.tokens)

    async def _list_models(self, _request: pb.ListModelsRequest, _caller: _Caller) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[card_to_proto(card) for card in self._service.models()])

    async def _cluster_status(self, _request: pb.ClusterStatusRequest, _caller: _Caller) -> pb.ClusterStatusResponse:
        return status_to_proto(self._service.status())

    async def _explain_route(self, request: pb.ExplainRouteRequest, caller: _Caller) -> pb.ExplainRouteResponse:
        decisions = await self._service.explain_route(request.request_id, tenant=caller.tenant)
        return pb.ExplainRouteResponse(decisions=map(decision_to_proto, decisions))


def _time_remaining_s(context: Context) -> float | None:
    """The client's deadline; None where it set none (gRPC then reports an absurdly long time)."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None or remaining_s > 1e8 else max(remaining_s, 1e-3)


def _trace_headers(context: Context) -> dict[str, str]:
    metadata = context.invocation_metadata() or ()
    return {name: str(value) for name, value in metadata if name in ("traceparent", "tracestate")}
