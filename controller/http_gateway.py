"""The HTTP door: OpenAI-style routes, health, metrics and the live page over an InferenceService.

POST /v1/chat/completions, POST /v1/completions, GET /v1/models[/NAME], GET /health, GET /metrics, GET /dashboard.
Closing the connection ends the request. With API keys in the configuration every route but /health and the page (not its
data) needs "Authorization: Bearer KEY", and metrics and the page's data an operator's. A refused call that comes back with the
same Idempotency-Key (or request_id) finds the place that was held for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..common import logs
from ..common.cluster_state import ModelCard
from ..common.config import GatewayConfig
from ..common.errors import InternalError, ModelNotFound, PilotfishError, clipped
from ..text.prepare import check_request_id
from ..text.tokenizer import Tokenizer
from . import dashboard
from .events import Delta, Started, Usage
from .http_server import (
    EventStream,
    Server,
    dump,
    error_response,
    json_response,
    make_server,
    read_body,
    unless_disconnected,
)
from .openai_response import Choice, ResponseWriter, error_json, usage_json
from .openai_schema import ChatBody, CompletionBody, RequestBody, parse_body
from .ports import listen
from .service import InferenceService, RequestHandle

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 10.0

RenderMetrics: TypeAlias = Callable[[], Awaitable[tuple[bytes, str]]]  # the text that Prometheus reads, and its media type


class HttpGateway:
    """Owns the HTTP server: `await start()`, then `await stop()`."""

    def __init__(
        self, service: InferenceService, tokenizer: Tokenizer, render_metrics: RenderMetrics, config: GatewayConfig
    ) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._render_metrics = render_metrics
        self._config = config
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._edge(self._chat), methods=["POST"]),
                Route("/v1/completions", self._edge(self._completions), methods=["POST"]),
                Route("/v1/models", self._edge(self._list_models)),
                Route("/v1/models/{name:path}", self._edge(self._show_model)),
                Route("/health", self._edge(self._health, open_to="all")),
                Route("/metrics", self._edge(self._show_metrics, open_to="operators")),
                Route("/dashboard", self._edge(self._dashboard, open_to="all")),
                Route("/dashboard/state", self._edge(self._dashboard_state, open_to="operators")),
            ],
            exception_handlers={HTTPException: _no_route},
        )
        self._server: Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen; returns the address.

        Raises:
            ConfigError: the port is in use or the host is not of this machine.
        """
        config = self._config
        listener = listen(config.host, config.http_port, flag="--http-port", shared=config.num_gateways > 1)
        self._server = make_server(self.app, self._config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        return f"{self._config.host}:{listener.getsockname()[1]}"

    async def stop(self) -> None:
        """Close the listener; responses under way get a few seconds."""
        if self._server is None or self._serving is None:
            return
        self._server.should_exit = True
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._serving

    def _edge(
        self,
        handler: Callable[[Request], Awaitable[Response]],
        *,
        open_to: Literal["tenants", "operators", "all"] = "tenants",
    ) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            try:
                if open_to != "all":
                    request.state.tenant = self._service.tenants.authenticate(request.headers.get("authorization"))
                if open_to == "operators":
                    self._service.tenants.check_operator(request.state.tenant)
                return await handler(request)
            except PilotfishError as error:
                return error_response(error)
            except Exception as error:  # noqa: BLE001 - a process's edge: logged and answered
                return error_response(_internal(error))

        return handle

    async def _chat(self, request: Request) -> Response:
        body = parse_body(ChatBody, await read_body(request, self._config))
        what = {
            "messages": [message.for_template() for message in body.messages],
            "continue_final_message": body.continue_final_message,
        }
        return await self._respond(request, body, "chat", [what])

    async def _completions(self, request: Request) -> Response:
        body = parse_body(CompletionBody, await read_body(request, self._config))
        whats = [{"prompt": prompt, "echo": body.echo} for prompt in body.prompts()]
        return await self._respond(request, body, "completion", whats)

    async def _respond(self, request: Request, body: RequestBody, kind: str, whats: list[dict[str, Any]]) -> Response:
        call_id = body.request_id or ("chatcmpl-" if kind == "chat" else "cmpl-") + uuid.uuid4().hex[:24]
        check_request_id(call_id)
        logs.request_id.set(call_id)  # here, for what follows runs in tasks of its own
        if body.user is not None:
            logger.info("request %s is from user %r", call_id, body.user, extra=logs.about(call_id, user=body.user))
        sampling = body.sampling()

        async def start() -> list[RequestHandle]:
            handles: list[RequestHandle] = []
            try:
                for number, what in enumerate(whats):
                    handles.append(
                        await self._service.start_request(
                            request_id=call_id if len(whats) == 1 else f"{call_id}.{number}",
                            sampling=sampling,
                            model=body.model,
                            priority=body.priority,
                            timeout_s=body.timeout_s,
                            tenant=request.state.tenant,
                            retry_key=request.headers.get("idempotency-key") or body.request_id or "",
                            trace_headers=request.headers,
                            is_more=number > 0,
                            **what,
                        )
                    )
            except BaseException:
                for handle in handles:
                    handle.cancel()
                raise
            return handles

        handles = await unless_disconnected(request.receive, start)
        call = _Call(handles, choices_per_prompt=sampling.get("n", 1))

        def writer(started: Started) -> ResponseWriter:
            return ResponseWriter(
                kind=kind,
                request_id=call_id,
                model=started.model,
                created_unix_s=started.created_unix_s,
                tokenizer=self._tokenizer,
                with_logprobs="logprobs" in sampling,
            )

        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(call.chunks(writer, with_usage=with_usage))
        return json_response(await unless_disconnected(request.receive, lambda: call.whole(writer)))

    async def _list_models(self, _request: Request) -> Response:
        return json_response({"object": "list", "data": [_card_json(card) for card in self._service.models()]})

    async def _show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        for card in self._service.models():
            if card.name == name:
                return json_response(_card_json(card))
        raise ModelNotFound(f"the model {name!r} is not served here; GET /v1/models lists what is")

    async def _health(self, _request: Request) -> Response:
        """200 while a replica makes progress or has nothing to do, or the next request brings one. It is open to all, so it
        says no more than that."""
        healthy = self._service.is_serving
        return json_response({"status": "ok" if healthy else "unavailable"}, status=200 if healthy else 503)

    async def _show_metrics(self, _request: Request) -> Response:
        content, media_type = await self._render_metrics()
        return Response(content, media_type=media_type)

    async def _dashboard(self, _request: Request) -> Response:
        return dashboard.page()

    async def _dashboard_state(self, _request: Request) -> Response:
        return json_response(dashboard.state_json(self._service.status()), headers={"Cache-Control": "no-store"})


class _Call:
    """The requests behind one HTTP call (one a prompt), read together."""

    def __init__(self, handles: list[RequestHandle], *, choices_per_prompt: int) -> None:
        self._handles = handles
        self._choices_per_prompt = choices_per_prompt

    async def whole(self, writer: Callable[[Started], ResponseWriter]) -> dict[str, Any]:
        try:
            results = await asyncio.gather(*(self._collect(number, handle) for number, handle in enumerate(self._handles)))
        finally:
            for handle in self._handles:  # nobody waits for the others of one that has failed
                handle.cancel()
        choices = [choice for _, of_prompt, _ in results for choice in of_prompt]
        return writer(results[0][0]).whole(choices, usage_json(usage for _, _, usage in results))

    async def _collect(self, number: int, handle: RequestHandle) -> tuple[Started, list[Choice], Usage]:
        choices: dict[int, Choice] = {}
        async with handle:
            async for event in handle:
                if isinstance(event, Started):
                    started = event
                elif isinstance(event, Delta):
                    index = number * self._choices_per_prompt + event.index
                    choices.setdefault(event.index, Choice(index)).add(event.content)
                else:
                    usage = event
        return started, [choices[index] for index in sorted(choices)], usage

    async def chunks(self, writer: Callable[[Started], ResponseWriter], *, with_usage: bool) -> AsyncIterator[str]:
        """The data lines of the stream. An error after the start is one line with the error, then the end."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                for handle in self._handles:
                    await stack.enter_async_context(handle)
                async for line in self._lines(writer, with_usage=with_usage):
                    yield line
        except PilotfishError as error:
            yield dump(error_json(error))
        except Exception as error:  # noqa: BLE001 - a process's edge: logged and answered
            yield dump(error_json(_internal(error)))
        yield "[DONE]"

    async def _lines(self, writer: Callable[[Started], ResponseWriter], *, with_usage: bool) -> AsyncIterator[str]:
        response: ResponseWriter | None = None
        usages: list[Usage] = []
        begun: dict[int, bool] = {}
        async for number, event in _merge(self._handles):
            if isinstance(event, Started):
                response = response or writer(event)
            elif isinstance(event, Usage):
                usages.append(event)
            elif response is not None:
                index = number * self._choices_per_prompt + event.index
                yield dump(response.chunk(index, event.content, first=not begun.get(index)))
                begun[index] = True
        if with_usage and response is not None:
            yield dump(response.usage_chunk(usage_json(usages)))


async def _merge(handles: list[RequestHandle]) -> AsyncIterator[tuple[int, Any]]:
    """Events of several requests as they come, each with its request's number."""
    if len(handles) == 1:
        async for event in handles[0]:
            yield 0, event
        return
    waiting = {asyncio.ensure_future(anext(handle)): number for number, handle in enumerate(handles)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                number = waiting.pop(task)
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                yield number, task.result()
                waiting[asyncio.ensure_future(anext(handles[number]))] = number
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _internal(error: Exception) -> InternalError:
    logger.exception("an HTTP call failed", exc_info=error)
    return InternalError(f"pilotfish failed ({type(error).__name__}); the controller's log has the details")


def _card_json(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created_unix_s,
        "owned_by": "pilotfish",
        "max_model_len": card.max_model_len,
    }


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = clipped(f"{request.method} {request.url.path}") + f": {error.detail}"
    body = {"error": {"message": message, "type": "invalid_request_error", "code": "not_found", "param": None}}
    return json_response(body, status=error.status_code, headers=dict(error.headers or {}))
