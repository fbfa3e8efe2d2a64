"""From the configuration to the spans of one process."""

from __future__ import annotations

from moe_ray.config.tracing import TracingSection
from moe_ray.observe.tracing import Tracing, TracingOptions


def open_tracing(section: TracingSection, part: str) -> Tracing | None:
    """Begin to send spans of `part`, e.g. "Trunk"; None where there is no endpoint, and then nothing is loaded."""
    if section.otlp_endpoint is None:
        return None
    options = TracingOptions(
        endpoint=section.otlp_endpoint,
        protocol=section.otlp_protocol,
        sample_ratio=section.sample_ratio,
        steps_per_request=section.steps_per_request,
    )
    return Tracing(options, part)
