"""OpenTelemetry spans of requests: the controller's half of a trace, from a client's traceparent to the end of its steps.

An Observer of the service and the dispatcher, only there where tracing is on (trace_setup.py). The spans of a request:

    pilotfish.request        from arrival to the end, under the caller's span; events: route
      pilotfish.prepare      template, tokenizer, checks
      pilotfish.queue        a choice waits for a replica; again after it has lost one
      pilotfish.worker       a choice runs on a replica; events: first_token. What the worker reports with its steps is in
                             attributes: steps that brought tokens and their milliseconds by part, tokens, prefix hits

A request's life here: `begin`, `accepted`, for each choice `on_dispatch` and `on_return`, then `on_request_end`; or `begin`
and `refused`.
Requests of which the sampler records nothing are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..common.errors import PilotfishError
from ..common.requests import SequenceOutput, StepOutput, StepTimings
from ..common.routing import RouteScore
from .events import Observer, RequestRecord

_CLOSE_TIMEOUT_MS = 5000


@dataclass(slots=True)
class _Run:
    """A choice on a replica, and what the steps said about it."""

    span: Span
    num_steps: int = 0
    num_tokens: int = 0
    step_ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("plan", "forward", "sample", "total"), 0.0))

    def add(self, output: SequenceOutput, timings: StepTimings) -> None:
        if output.token_ids and not self.num_tokens:
            self.span.add_event("first_token", {"pilotfish.cached_tokens": output.cached_tokens})
            self.span.set_attribute("pilotfish.cached_tokens", output.cached_tokens)
        self.num_steps += 1
        self.num_tokens += len(output.token_ids)
        for part in self.step_ms:
            self.step_ms[part] += getattr(timings, f"{part}_ms")

    def end(self, outcome: str, *, is_error: bool = False) -> None:
        span = self.span
        span.set_attribute("pilotfish.num_steps", self.num_steps)
        span.set_attribute("pilotfish.output_tokens", self.num_tokens)
        for part, milliseconds in self.step_ms.items():
            span.set_attribute(f"pilotfish.step.{part}_ms", round(milliseconds, 3))
        span.set_attribute("pilotfish.finish_reason", outcome)
        if is_error:
            span.set_status(Status(StatusCode.ERROR, outcome))
        span.end()


@dataclass(slots=True)
class _Request:
    span: Span
    prepare: Span
    queued: dict[int, Span] = field(default_factory=dict)
    runs: dict[str, _Run] = field(default_factory=dict)


class RequestTracing(Observer):
    """See the module's docstring. `close` exports what is left."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("pilotfish.controller")
        self._propagator = TraceContextTextMapPropagator()
        self._requests: dict[str, _Request] = {}
        self._runs: dict[str, _Run] = {}  # by wire id

    def begin(self, request_id: str, model: str, headers: Mapping[str, str]) -> None:
        """A request has come, with the headers `traceparent` and `tracestate` where its caller traces."""
        span = self._tracer.start_span(
            "pilotfish.request",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes={"pilotfish.request_id": request_id, "gen_ai.request.model": model},
        )
        if span.is_recording():
            self._requests[request_id] = _Request(span, self._child(span, "pilotfish.prepare"))
        else:
            span.end()

    def accepted(self, request_id: str, *, num_prompt_tokens: int, num_choices: int) -> None:
        """It is in tokens now and goes into the queue."""
        if (request := self._requests.get(request_id)) is not None:
            request.prepare.end()
            request.span.set_attribute("gen_ai.usage.input_tokens", num_prompt_tokens)
            for index in range(num_choices):
                request.queued[index] = self._child(request.span, "pilotfish.queue", index)

    def refused(self, request_id: str, error: BaseException) -> None:
        if (request := self._requests.pop(request_id, None)) is not None:
            self._end_parts(request, "refused")
            code = error.code if isinstance(error, PilotfishError) else type(error).__name__
            request.span.set_attribute("error.type", code)
            request.span.set_status(Status(StatusCode.ERROR, code))
            request.span.end()

    def on_dispatch(self, request_id: str, index: int, wire_id: str, replica: str, scores: Sequence[RouteScore]) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        if (queued := request.queued.pop(index, None)) is not None:
            queued.end()
        said = [f"{score.replica}: {score.cost_ms:.1f} ms, {score.matched_tokens} tokens cached" for score in scores]
        request.span.add_event("route", {"pilotfish.replica": replica, "pilotfish.choice": index, "pilotfish.scores": said})
        span = self._child(request.span, "pilotfish.worker", index)
        span.set_attribute("pilotfish.replica", replica)
        span.set_attribute("pilotfish.run_id", wire_id)
        request.runs[wire_id] = self._runs[wire_id] = _Run(span)

    def on_return(self, request_id: str, index: int, wire_id: str, reason: str) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        if (run := self._take_run(request, wire_id)) is not None:
            run.end(reason, is_error=True)
        request.queued[index] = self._child(request.span, "pilotfish.queue", index)

    def on_step(self, replica: str, step: StepOutput) -> None:  # noqa: ARG002 - run ids are known to all replicas
        if not self._runs:
            return
        for output in step.sequences:
            if (run := self._runs.get(output.request_id)) is not None:
                run.add(output, step.timings)
                if output.finish_reason is not None:
                    del self._runs[output.request_id]
                    run.end(output.finish_reason.value, is_error=bool(output.error))

    def on_request_end(self, record: RequestRecord) -> None:
        request = self._requests.pop(record.request_id, None)
        if request is None:
            return
        self._end_parts(request, record.error_code or "ended")
        span, usage = request.span, record.usage
        span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        span.set_attribute("pilotfish.cached_tokens", usage.cached_tokens)
        span.set_attribute("pilotfish.num_attempts", record.num_attempts)
        span.set_attribute("gen_ai.response.finish_reasons", [reason.value for reason in record.finish_reasons])
        if record.error_code:
            span.set_attribute("error.type", record.error_code)
            span.set_status(Status(StatusCode.ERROR, record.error_code))
        span.end()

    def close(self) -> None:
        """Takes up to some seconds where the exporter does not get through; call it off the event loop."""
        self._provider.force_flush(_CLOSE_TIMEOUT_MS)
        self._provider.shutdown()

    def _child(self, parent: Span, name: str, index: int | None = None) -> Span:
        attributes = None if index is None else {"pilotfish.choice": index}
        return self._tracer.start_span(name, context=set_span_in_context(parent), attributes=attributes)

    def _take_run(self, request: _Request, wire_id: str) -> _Run | None:
        """A run whose span has not ended."""
        request.runs.pop(wire_id, None)
        return self._runs.pop(wire_id, None)

    def _end_parts(self, request: _Request, outcome: str) -> None:
        for wire_id in list(request.runs):
            if (run := self._take_run(request, wire_id)) is not None:
                run.end(outcome)
        for span in (request.prepare, *request.queued.values()):
            if span.is_recording():
                span.end()
