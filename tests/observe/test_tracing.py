"""OpenTelemetry spans of real requests, as a real collector receives them: over gRPC and over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from in_process import Trunk, served
from on_a_loop import on_a_loop
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from moe_ray.config import load_config
from moe_ray.deploy.open_tracing import open_tracing
from moe_ray.errors import ConfigError
from moe_ray.observe.tracing import Tracing, TracingOptions

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{CALLER}-01", f"00-{TRACE}-{CALLER}-00"
ASK: dict[str, Any] = {"prompt": list(range(5, 25)), "max_tokens": 6, "temperature": 0, "ignore_eos": True}
LAYERS, STEPS = 4, 3


class Collector:
    """What was received: (part, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.services: set[str] = set()

    def take(self, request: otlp.ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            of = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.services.add(of["service.name"])
            for scope in resource.scope_spans:
                self.spans += [(of["moe_ray.part"], span) for span in scope.spans]

    def named(self, name: str) -> list[Span]:
        return [span for _, span in self.spans if span.name == name]


@contextmanager
def grpc_collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Service(otlp_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> otlp.ExportTraceServiceResponse:
            collector.take(request)
            return otlp.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    otlp_grpc.add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


@contextmanager
def http_collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.take(otlp.ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield collector, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def attributes(span: Span) -> dict[str, Any]:
    told = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        told[each.key] = [getattr(v, v.WhichOneof("value")) for v in value.values] if kind == "array_value" else value
    return told


COLLECTORS = {"grpc": grpc_collector, "http/protobuf": http_collector}


@pytest.mark.parametrize("protocol", COLLECTORS)
def test_one_request_is_one_trace(protocol: str, readable_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    with COLLECTORS[protocol]() as (collector, endpoint):
        options = TracingOptions(endpoint, protocol, 0.0, STEPS)
        gateway, trunk = Tracing(options, "Gateway"), Trunk(readable_model, Tracing(options, "Trunk"))

        @on_a_loop
        async def ask() -> None:
            async with served(readable_model, [trunk.info], tracing=gateway) as client:
                headers = {"traceparent": SAMPLED, "X-Request-Id": "r-1"}
                done = await client.post("/v1/completions", json=ASK, headers=headers)
                assert done.status_code == 200
                for headers in ({}, {"traceparent": NOT_SAMPLED}, {"traceparent": "00-nonsense"}):
                    assert (await client.post("/v1/completions", json=ASK, headers=headers)).status_code == 200
                await client.get("/health", headers={"traceparent": SAMPLED})

        ask()
        trunk.close()
        gateway.close()

    assert collector.services == {"moe-ray"}
    spans = [span for _, span in collector.spans]
    assert {span.trace_id.hex() for span in spans} == {TRACE}, "nobody decided for the others, and the ratio is 0"
    (root,) = collector.named("POST /v1/completions")
    assert root.parent_span_id.hex() == CALLER
    assert root.kind == Span.SPAN_KIND_SERVER
    told = attributes(root)
    assert told["http.response.status_code"] == 200
    assert told["moe_ray.request_id"] == "r-1"
    assert told["gen_ai.usage.input_tokens"] == 20
    assert told["gen_ai.usage.output_tokens"] == 6
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert told["gen_ai.request.model"] == "random"
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.request.max_tokens"] == 6
    assert 0 < told["gen_ai.latency.time_to_first_token"] <= told["gen_ai.latency.e2e"]

    (there,) = collector.named("trunk request")
    assert there.parent_span_id == root.span_id
    assert attributes(there)["gen_ai.usage.output_tokens"] == 6
    (queue,), (prefill,), (decode,) = (collector.named(name) for name in ("queue", "prefill", "decode"))
    for span in (queue, prefill, decode):
        assert span.parent_span_id == there.span_id
    slack = 1_000_000  # the epoch is read anew for each moment
    assert there.start_time_unix_nano <= queue.start_time_unix_nano + slack
    assert abs(queue.end_time_unix_nano - prefill.start_time_unix_nano) < slack
    assert abs(prefill.end_time_unix_nano - decode.start_time_unix_nano) < slack
    assert decode.end_time_unix_nano <= there.end_time_unix_nano + slack

    steps = collector.named("step")
    assert len(steps) == STEPS, "no more, though there were six"
    assert {step.parent_span_id for step in steps} == {there.span_id}
    assert sorted(attributes(step)["moe_ray.step.tokens"] for step in steps) == [1, 1, 20]
    for layer in range(LAYERS):
        calls = collector.named(f"experts of layer {layer}")
        assert {call.parent_span_id for call in calls} == {step.span_id for step in steps}
        for call in calls:
            told = attributes(call)
            assert told["moe_ray.layer"] == layer
            assert len(told["moe_ray.experts"]) == len(told["moe_ray.rows"]) >= 2
            assert sum(told["moe_ray.rows"]) in (2, 40)
            assert told["moe_ray.gather_s"] > 0
    assert len(spans) == 1 + 1 + 3 + STEPS * (1 + LAYERS)
    assert {part for part, span in collector.spans if span.name == "step"} == {"Trunk"}


def test_what_fails_is_an_error_in_its_span(readable_model: Path) -> None:
    with grpc_collector() as (collector, endpoint):
        options = TracingOptions(endpoint)
        gateway, trunk = Tracing(options, "Gateway"), Trunk(readable_model, Tracing(options, "Trunk"))

        @on_a_loop
        async def ask() -> None:
            async with served(readable_model, [trunk.info], tracing=gateway) as client:
                trunk.engine.error = RuntimeError("broken")
                assert (await client.post("/v1/completions", json=ASK)).status_code == 500
                trunk.engine.error = None
                assert (await client.post("/v1/completions", json={**ASK, "top_p": 2})).status_code == 400

        ask()
        trunk.close()
        gateway.close()
    failed, refused = sorted(collector.named("POST /v1/completions"), key=lambda span: span.start_time_unix_nano)
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert refused.status.code == Status.STATUS_CODE_UNSET
    assert failed.trace_id != refused.trace_id
    (there,) = collector.named("trunk request")
    assert there.trace_id == failed.trace_id
    assert [event.name for event in there.events] == ["exception"]


def test_where_spans_go(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "TRACES_ENDPOINT", "PROTOCOL", "TRACES_PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    assert load_config().tracing.otlp_endpoint is None
    assert open_tracing(load_config().tracing, "Gateway") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    section = load_config().tracing
    assert (section.otlp_endpoint, section.otlp_protocol) == ("http://collector:4318", "http/protobuf")
    assert load_config({"tracing": {"otlp_endpoint": "http://flag:1"}}).tracing.otlp_endpoint == "http://flag:1"
    with pytest.raises(ConfigError, match=r"tracing\.otlp_endpoint.*must be a URL"):
        load_config({"tracing": {"otlp_endpoint": "collector:4317"}})
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(
        ConfigError, match="`otlp_protocol`: Input should be 'grpc' or 'http/protobuf', got 'http/json'"
    ):
        load_config()
