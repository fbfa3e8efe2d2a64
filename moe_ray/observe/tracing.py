"""OpenTelemetry spans, sent over OTLP. Its SDK is loaded only where there is an endpoint to send them to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

Attribute = str | int | float | bool | list[str] | list[int]
SERVICE: Final = "moe-ray"
TRACES_PATH: Final = "/v1/traces"
"""Of a collector's HTTP port, where its URL names no path."""


@dataclass(frozen=True, slots=True)
class TracingOptions:
    """Where spans go, and of which requests there are some."""

    endpoint: str
    protocol: str = "grpc"
    """Or "http/protobuf"."""
    sample_ratio: float = 1.0
    """Of requests whose callers have not decided."""
    steps_per_request: int = 4
    """Steps with spans of their own."""


class Tracing:
    """The spans of one process. Thread-safe; spans are sent on a thread of the SDK."""

    def __init__(self, options: TracingOptions, part: str) -> None:
        """`part`: which process of the model it is, e.g. "gateway"."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        self.options = options
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, which the SDK reads itself, win over these.
        detected = dict(Resource.create().attributes)
        if str(detected.get("service.name", "")).startswith("unknown_service"):
            detected["service.name"] = SERVICE
        resource = Resource({"moe_ray.part": part, **detected})
        self._provider: TracerProvider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(options.sample_ratio)), resource=resource
        )
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(options)))
        self._tracer = self._provider.get_tracer("moe_ray")

    def begin(self, name: str, kind: str, parent: str = "", state: str = "") -> Span:
        """Begin a span, a child of the W3C trace context `parent` where that is one. `kind`: of `SpanKind`."""
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(name, _context(parent, state), SpanKind[kind])

    def record(
        self, name: str, parent: Span, begun_s: float, ended_s: float, attributes: Mapping[str, Attribute] | None = None
    ) -> Span:
        """Record a span that has ended; times by `time.perf_counter`."""
        from opentelemetry.trace import set_span_in_context

        begun, ended = epoch_ns(begun_s), epoch_ns(ended_s)
        span = self._tracer.start_span(name, set_span_in_context(parent), attributes=attributes, start_time=begun)
        span.end(ended)
        return span

    def close(self) -> None:
        """Send what is left, and end. Idempotent."""
        self._provider.shutdown()


def traceparent_of(span: Span) -> str:
    """The W3C trace context that makes other spans children of this one; "" for one that is not sampled."""
    context = span.get_span_context()
    if not context.trace_flags.sampled:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def epoch_ns(at_s: float) -> int:
    """The nanoseconds since 1970 at a moment of `time.perf_counter`."""
    return time.time_ns() - int((time.perf_counter() - at_s) * 1e9)


def _context(parent: str, state: str) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": parent, **({"tracestate": state} if state else {})}
    return TraceContextTextMapPropagator().extract(carrier, Context()) if parent else Context()


def _exporter(options: TracingOptions) -> SpanExporter:
    if options.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=options.endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    bare = urlsplit(options.endpoint).path in ("", "/")
    return HttpExporter(endpoint=options.endpoint.rstrip("/") + TRACES_PATH if bare else options.endpoint)
