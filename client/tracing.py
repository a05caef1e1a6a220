"""Spans of the SDK's calls for text, where the application traces with OpenTelemetry; otherwise nothing, at no cost.

OpenTelemetry is never imported for its own sake: an application that traces has imported it and set its provider up. Each gRPC
call is a client span, so a request that was tried again has several; its W3C traceparent goes with the call as metadata, and
the server's spans come under it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import grpc

Metadata = tuple[tuple[str, str], ...]

_ending: set[asyncio.Task[None]] = set()  # the event loop itself keeps no task alive


def traced(
    begin: Callable[[str, Any, float | None, Metadata], Any], *, address: str, metadata: Metadata
) -> Callable[[str, Any, float | None], Any]:
    """`begin(method, request, timeout_s, metadata)`, which makes a call that streams, with that metadata and a span a call."""

    def begin_traced(method: str, request: Any, timeout_s: float | None) -> Any:
        return _traced_call(method, address, metadata, lambda metadata: begin(method, request, timeout_s, metadata))

    return begin_traced


def _traced_call(method: str, address: str, metadata: Metadata, begin: Callable[[Metadata], Any]) -> Any:
    """The span ends when the call does."""
    if "opentelemetry.trace" not in sys.modules:
        return begin(metadata)
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    span = trace.get_tracer("pilotfish.client").start_span(
        f"pilotfish.v1.Inference/{method}",
        kind=trace.SpanKind.CLIENT,
        attributes={
            "rpc.system": "grpc",
            "rpc.service": "pilotfish.v1.Inference",
            "rpc.method": method,
            "server.address": address,
        },
    )
    if not span.get_span_context().is_valid:  # no provider was set up
        return begin(metadata)
    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers, trace.set_span_in_context(span))
    try:
        call = begin((*metadata, *headers.items()))
    except BaseException:
        span.end()
        raise
    call.add_done_callback(lambda done: _end(span, done))
    return call


def _end(span: Any, call: Any) -> None:
    if isinstance(call, grpc.aio.Call):
        task = asyncio.get_running_loop().create_task(_end_async(span, call))
        _ending.add(task)
        task.add_done_callback(_ending.discard)
    else:
        _end_with(span, call.code())


async def _end_async(span: Any, call: grpc.aio.Call) -> None:
    _end_with(span, await call.code())


def _end_with(span: Any, code: grpc.StatusCode) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if code is not grpc.StatusCode.OK:
        span.set_status(Status(StatusCode.ERROR, code.name))
    span.end()
