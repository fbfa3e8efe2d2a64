"""The `tracing` section: OpenTelemetry spans of requests."""

from __future__ import annotations

import os
from typing import Literal, cast
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from moe_ray.config.section import Section

Protocol = Literal["grpc", "http/protobuf"]


def _endpoint() -> str | None:
    variables = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next((value for name in variables if (value := os.environ.get(name))), None)


def _protocol() -> Protocol:
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    found = next((value for name in variables if (value := os.environ.get(name))), "grpc")
    return cast(Protocol, found)


class TracingSection(Section):
    """OpenTelemetry spans of requests."""

    otlp_endpoint: str | None = Field(default_factory=_endpoint)
    """URL of a collector that takes OTLP, e.g. `http://127.0.0.1:4317`. Default: as OpenTelemetry's variable
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT says; without one nothing is traced."""
    otlp_protocol: Protocol = Field(default_factory=_protocol, validate_default=True)
    """How spans are sent. Default: as OTEL_EXPORTER_OTLP_TRACES_PROTOCOL or OTEL_EXPORTER_OTLP_PROTOCOL says, else
    grpc."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are traced. Of one that comes with a trace context, the caller has decided."""
    steps_per_request: int = Field(default=4, ge=0, le=64)
    """Steps of a traced request that have spans of their own, with one for each layer."""

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).netloc):
            raise ValueError("must be a URL such as http://127.0.0.1:4317")
        return value
