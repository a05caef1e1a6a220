"""Whether this controller traces, and where to: OpenTelemetry's own environment variables say so.

Off unless OTEL_TRACES_EXPORTER names an exporter or OTEL_EXPORTER_OTLP_[TRACES_]ENDPOINT an address; nothing of OpenTelemetry
is imported while it is off. All of the SDK's variables hold: sampler, headers, certificates, batches, resource.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ..common.errors import ConfigError

if TYPE_CHECKING:
    from .tracing import RequestTracing

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_INSTALL = "pip install 'pilotfish[traces]'"


def exporter_name(environment: Mapping[str, str]) -> str:
    """The exporter's entry point; empty where tracing is off."""
    name = environment.get("OTEL_TRACES_EXPORTER", "").strip()
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or name == "none":
        return ""
    if not name:
        name = "otlp" if any(environment.get(variable) for variable in _ENDPOINTS) else ""
    if name != "otlp":
        return name
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    return "otlp_proto_http" if protocol.startswith("http") else "otlp_proto_grpc"


def tracing_from_environment(environment: Mapping[str, str]) -> RequestTracing | None:
    """None where tracing is off.

    Raises:
        ConfigError: it is on, but the SDK or the exporter is not installed.
    """
    name = exporter_name(environment)
    if not name:
        return None
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from .tracing import RequestTracing
    except ImportError as error:
        raise ConfigError(f"OTEL_ variables turn tracing on, but {error.name} is not installed: {_INSTALL}") from error
    found = tuple(entry_points(group="opentelemetry_traces_exporter", name=name))
    if not found:
        known = ", ".join(sorted(entry.name for entry in entry_points(group="opentelemetry_traces_exporter")))
        raise ConfigError(f"there is no exporter of traces {name!r} (installed: {known}); {_INSTALL} has otlp over gRPC")
    own = {} if environment.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "pilotfish"}
    provider = TracerProvider(resource=Resource.create(own))
    provider.add_span_processor(BatchSpanProcessor(found[0].load()()))
    return RequestTracing(provider)
