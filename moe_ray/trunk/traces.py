"""The spans of a trunk: its share of each traced request, with queue, prefill and decode, and the first steps of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_ray.core import Request, TokenEvent
from moe_ray.engine.traced_step import TracedStep
from moe_ray.observe.tracing import Tracing
from moe_ray.timings import LayerTimes

if TYPE_CHECKING:
    from opentelemetry.trace import Span


@dataclass(slots=True, eq=False)
class _Traced:
    span: Span
    stream: object
    begun_s: float
    queue_s: float = 0.0
    first_s: float = 0.0
    num_tokens: int = 0


class RequestTraces:
    """The traced requests that a trunk has. Thread-safe: each request is touched by the threads of its stream alone."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._live: dict[str, _Traced] = {}

    def begin(self, request: Request, stream: object) -> None:
        """A request has come over a gateway's `stream`; nothing, unless it is traced."""
        if not request.traceparent:
            return
        span = self._tracing.begin("trunk request", "SERVER", request.traceparent)
        span.set_attribute("gen_ai.request.id", request.request_id)
        span.set_attribute("gen_ai.usage.input_tokens", len(request.prompt_token_ids))
        self._live[request.request_id] = _Traced(span, stream, time.perf_counter())

    def note(self, events: Iterable[TokenEvent]) -> None:
        """Take in what one step brought one gateway."""
        if not self._live:
            return
        for event in events:
            traced = self._live.get(event.request_id)
            if traced is None:
                continue
            if event.token_ids and not traced.num_tokens:
                traced.first_s, traced.queue_s = time.perf_counter(), event.queue_s
                traced.span.set_attribute("gen_ai.usage.cache_read.input_tokens", event.num_cached_tokens)
            traced.num_tokens += len(event.token_ids)
            if event.last:
                self._end(event.request_id, event.finish_reason or "error", event.error)

    def end(self, request_ids: Iterable[str]) -> None:
        """Requests that are no longer wanted."""
        for request_id in request_ids:
            self._end(request_id, "abort", None)

    def drop(self, stream: object) -> None:
        """The gateway behind a stream is gone."""
        self.end([request_id for request_id, traced in list(self._live.items()) if traced.stream is stream])

    def step(self, step: TracedStep) -> None:
        """Record a step, and the expert calls of its layers, for each traced request that it computed."""
        for request_id in step.request_ids:
            traced = self._live.get(request_id)
            if traced is None:
                continue
            sizes = {"moe_ray.step.sequences": step.num_sequences, "moe_ray.step.tokens": step.num_tokens}
            span = self._tracing.record("step", traced.span, step.begun_s, step.ended_s, sizes)
            for layer in step.layers:
                self._layer(span, layer)

    def _layer(self, step: Span, layer: LayerTimes) -> None:
        experts = [expert for expert, rows in enumerate(layer.rows) if rows]
        self._tracing.record(
            f"experts of layer {layer.layer}",
            step,
            layer.begun_s,
            layer.gathered_s,
            {
                "moe_ray.layer": layer.layer,
                "moe_ray.experts": experts,
                "moe_ray.rows": [layer.rows[expert] for expert in experts],
                "moe_ray.scatter_s": layer.sent_s - layer.begun_s,
                "moe_ray.gather_s": layer.gathered_s - layer.waited_from_s,
            },
        )

    def _end(self, request_id: str, reason: str, error: Exception | None) -> None:
        traced = self._live.pop(request_id, None)
        if traced is None:
            return
        span, now = traced.span, time.perf_counter()
        if traced.num_tokens:
            computed_s = traced.begun_s + traced.queue_s
            self._tracing.record("queue", span, traced.begun_s, computed_s)
            self._tracing.record("prefill", span, computed_s, traced.first_s)
            self._tracing.record("decode", span, traced.first_s, now)
        span.set_attribute("gen_ai.usage.output_tokens", traced.num_tokens)
        span.set_attribute("gen_ai.response.finish_reasons", [reason])
        if error is not None:
            span.record_exception(error)
        span.end()
