"""One trace from a client to the steps of its request, through real doors, with spans kept in memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_calls import raw
from local_workers import LocalLauncher
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from pilotfish.client import AsyncClient, Client
from pilotfish.common.config import EngineConfig, FleetConfig, GatewayConfig, ModelConfig, ServeConfig
from pilotfish.common.errors import ConfigError, InvalidRequest
from pilotfish.controller.controller import Controller
from pilotfish.controller.trace_setup import exporter_name, tracing_from_environment
from pilotfish.controller.tracing import RequestTracing

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Spans(InMemorySpanExporter):
    """What was exported, by name."""

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
def provider(spans: Spans) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider


@pytest.fixture
def application(provider: TracerProvider, monkeypatch: pytest.MonkeyPatch) -> Iterator[TracerProvider]:
    """The provider is the process's, as an application that traces sets it up."""
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return provider


class Traced:
    """A controller that traces, and its launcher, inside an `async with` block."""

    def __init__(self, path: Path, provider: TracerProvider, **engine_options: object) -> None:
        self.launcher = LocalLauncher(engine_options=dict(engine_options))
        config = ServeConfig(
            model=ModelConfig(model="tiny"),
            engine=EngineConfig(),
            gateway=GatewayConfig(grpc_port=0, http_port=0),
            fleet=FleetConfig(num_replicas=2, heartbeat_timeout_s=5.0),
        )
        self.tracing = RequestTracing(provider)
        self.controller = Controller(
            config,
            model_path=path,
            launcher=self.launcher,
            authority=self.launcher.authority,
            controller_id="test",
            tracing=self.tracing,
        )

    @property
    def service(self):
        return self.controller.service

    async def __aenter__(self) -> Traced:
        await self.controller.start()
        await self.controller.wait_ready()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.controller.stop()


def assert_one_trace(spans: Spans, *, num_workers: int = 1) -> None:
    client, request = spans.one("pilotfish.v1.Inference/Generate"), spans.one("pilotfish.request")
    children = [spans.one("pilotfish.prepare"), *spans.named("pilotfish.queue"), *spans.named("pilotfish.worker")]
    assert len(children) == 1 + 2 * num_workers
    assert {span.context.trace_id for span in (client, request, *children)} == {client.context.trace_id}
    assert request.parent is not None
    assert request.parent.span_id == client.context.span_id
    assert {child.parent and child.parent.span_id for child in children} == {request.context.span_id}


async def test_one_trace_from_the_async_client_to_the_steps(
    tokenizer_path: Path, spans: Spans, application: TracerProvider
) -> None:
    async with Traced(tokenizer_path, application) as cluster:
        async with AsyncClient(cluster.service.addresses.grpc) as client:
            with trace.get_tracer("test").start_as_current_span("application"):
                await client.generate(list(range(40)), max_tokens=5, n=2, request_id="req-7", ignore_eos=True)
        await until(lambda: spans.named("pilotfish.v1.Inference/Generate"))
    assert_one_trace(spans, num_workers=2)
    client_span, request = spans.one("pilotfish.v1.Inference/Generate"), spans.one("pilotfish.request")
    assert client_span.parent is not None
    assert client_span.parent.span_id == spans.one("application").context.span_id
    assert client_span.attributes["rpc.grpc.status_code"] == 0
    assert request.attributes["pilotfish.request_id"] == "req-7"
    assert (request.attributes["gen_ai.usage.input_tokens"], request.attributes["gen_ai.usage.output_tokens"]) == (40, 10)
    assert [event.name for event in request.events] == ["route", "route"]
    for worker in spans.named("pilotfish.worker"):
        assert worker.attributes["pilotfish.output_tokens"] == 5
        assert worker.attributes["pilotfish.num_steps"] == 5
        assert worker.attributes["pilotfish.finish_reason"] == "length"
        assert worker.attributes["pilotfish.replica"] in ("replica-0", "replica-1")
        assert [event.name for event in worker.events] == ["first_token"]
        assert request.start_time <= worker.start_time <= worker.end_time <= request.end_time
    assert not cluster.tracing._requests
    assert not cluster.tracing._runs


async def test_one_trace_from_the_client_for_threads(tokenizer_path: Path, spans: Spans, application: TracerProvider) -> None:
    async with Traced(tokenizer_path, application) as cluster:

        def work() -> None:
            with Client(cluster.service.addresses.grpc) as client:
                client.generate("ab", max_tokens=3, ignore_eos=True)

        await asyncio.to_thread(work)
        await until(lambda: spans.named("pilotfish.v1.Inference/Generate"))
    assert_one_trace(spans)


async def test_an_http_header_is_the_parent(tokenizer_path: Path, spans: Spans, provider: TracerProvider) -> None:
    async with Traced(tokenizer_path, provider) as cluster:
        body = b'{"model":"tiny","prompt":[1,2,3],"max_tokens":2}'
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\ntraceparent: 00-{TRACE_ID}-{SPAN_ID}-01\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        status, _, _ = await raw(cluster, head.encode() + body)
    assert status == 200
    request = spans.one("pilotfish.request")
    assert request.context.trace_id == int(TRACE_ID, 16)
    assert request.parent.span_id == int(SPAN_ID, 16)
    assert spans.one("pilotfish.worker").context.trace_id == int(TRACE_ID, 16)


async def test_a_malformed_header_begins_a_new_trace(tokenizer_path: Path, spans: Spans, provider: TracerProvider) -> None:
    async with Traced(tokenizer_path, provider) as cluster:
        for number, header in enumerate(("", "00-zz", "00-" + "0" * 32 + "-" + SPAN_ID + "-01", "x" * 5000)):
            async with await cluster.service.start_request(
                request_id=f"r{number}", prompt=[1, 2], sampling={"max_tokens": 1}, trace_headers={"traceparent": header}
            ) as handle:
                async for _ in handle:
                    pass
    requests = spans.named("pilotfish.request")
    assert [request.parent for request in requests] == [None] * 4


async def test_a_lost_replica_is_a_second_run_in_the_same_trace(
    tokenizer_path: Path, spans: Spans, provider: TracerProvider
) -> None:
    async with (
        Traced(tokenizer_path, provider, step_s=0.02) as cluster,
        await cluster.service.start_request(prompt=list(range(20)), sampling={"max_tokens": 60, "ignore_eos": True}) as handle,
    ):
        events = [await anext(handle), await anext(handle)]
        replica = handle._stream.sequences[0].replica
        await cluster.launcher.launched[int(replica[-1])].kill()
        events += [event async for event in handle]
    first, second = spans.named("pilotfish.worker")
    assert not first.status.is_ok
    assert second.status.is_ok
    assert first.attributes["pilotfish.replica"] != second.attributes["pilotfish.replica"]
    assert first.attributes["pilotfish.output_tokens"] + second.attributes["pilotfish.output_tokens"] == 60
    assert len(spans.named("pilotfish.queue")) == 2
    assert spans.one("pilotfish.request").attributes["pilotfish.num_attempts"] == 2


async def test_refusals_and_cancellations_end_their_spans(tokenizer_path: Path, spans: Spans, provider: TracerProvider) -> None:
    async with Traced(tokenizer_path, provider, step_s=0.02) as cluster:
        with pytest.raises(InvalidRequest):
            await cluster.service.start_request(prompt="", sampling={})
        refused = spans.one("pilotfish.request")
        assert refused.attributes["error.type"] == "invalid_request"
        assert len(spans.named("pilotfish.prepare")) == 1
        spans.clear()
        handle = await cluster.service.start_request(prompt=[1, 2], sampling={"max_tokens": 1000, "ignore_eos": True})
        await anext(handle)
        handle.cancel()
        assert spans.one("pilotfish.request").attributes["error.type"] == "cancelled"
        assert len(spans.named("pilotfish.worker")) == 1
        assert not cluster.tracing._requests
        assert not cluster.tracing._runs


async def test_what_the_sampler_drops_is_not_kept(tokenizer_path: Path, spans: Spans) -> None:
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF))
    provider.add_span_processor(SimpleSpanProcessor(spans))
    async with Traced(tokenizer_path, provider, step_s=0.02) as cluster:
        handle = await cluster.service.start_request(prompt=[1, 2], sampling={"max_tokens": 1000, "ignore_eos": True})
        await anext(handle)
        assert not cluster.tracing._requests
        handle.cancel()
    assert not spans.get_finished_spans()


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, ""),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317"}, ""),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317"}, "otlp_proto_grpc"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "otlp_proto_http"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
    ],
)
def test_the_environment_says_where_to(environment: dict[str, str], name: str) -> None:
    assert exporter_name(environment) == name


def test_an_exporter_from_the_environment() -> None:
    tracing = tracing_from_environment({"OTEL_TRACES_EXPORTER": "console"})
    assert tracing is not None
    tracing.close()
    with pytest.raises(ConfigError, match=r"no exporter of traces 'jaeger'.*pilotfish\[traces\]"):
        tracing_from_environment({"OTEL_TRACES_EXPORTER": "jaeger"})


def test_tracing_that_is_off_imports_nothing() -> None:
    script = (
        "import sys, pilotfish.client, pilotfish.controller.controller\n"
        "from pilotfish.controller.trace_setup import tracing_from_environment\n"
        "assert tracing_from_environment({}) is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
