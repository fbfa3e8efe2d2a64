"""What a gateway observes of its HTTP requests: ids, counts, spans and one line in the log for each."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_ray.api.generation import EventSource
from moe_ray.api.job import GenerationJob
from moe_ray.api.job_watch import Ended, JobWatch
from moe_ray.api.output import JobOutput
from moe_ray.core import Request
from moe_ray.observe.request_counts import RequestCounts
from moe_ray.observe.tracing import Tracing, traceparent_of
from moe_ray.telemetry import FIELDS, current_request_id

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger("moe_ray.access")

REQUEST_ID: Final = b"x-request-id"
_ACCEPTED_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")
PROBES: Final = frozenset({"/health", "/ping", "/metrics"})
"""Asked every few seconds by machines: their lines are at level debug, and they have no spans."""
CHATS: Final = ("chat", "messages", "responses")
"""Words in the paths of chats, of every API: what a span calls the operation."""
_FAILURES: Final = {400: "validation", 413: "validation", 422: "validation", 429: "overloaded"}
"""Status of a POST that became no job → what counts as its failure; 5xx: "generation"."""


@dataclass(slots=True, eq=False)
class HttpWatch:
    """One HTTP request."""

    request_id: str
    method: str
    path: str
    arrived_s: float
    """By `time.perf_counter`."""
    span: Span | None = None
    status: int = 0
    """0: no response has begun."""
    jobs: list[JobWatch] = field(default_factory=list)


_current: Final[ContextVar[HttpWatch | None]] = ContextVar("current_http_request", default=None)


class Observation:
    """Of one gateway. Its methods run on the gateway's loop."""

    def __init__(
        self, model: str, tracing: Tracing | None = None, on_end: Callable[[Ended], None] | None = None
    ) -> None:
        """`on_end` is told of each sequence that has ended, and must not block."""
        self.model, self.counts = model, RequestCounts()
        self._tracing, self._on_end = tracing, on_end

    def begin(self, scope: Scope, path: str) -> HttpWatch:
        """An HTTP request has come."""
        headers = dict(scope["headers"])
        watch = HttpWatch(accepted_id(headers.get(REQUEST_ID)), scope["method"], path, time.perf_counter())
        if self._tracing is not None and path not in PROBES:
            parent, state = (headers.get(name, b"").decode("latin-1") for name in (b"traceparent", b"tracestate"))
            watch.span = self._tracing.begin(f"{watch.method} {path}", "SERVER", parent, state)
        self.counts.in_flight += 1
        return watch

    def open(self, output: JobOutput, start: Callable[[list[tuple[int, Request]]], EventSource]) -> EventSource:
        """Start the job of `output` by `start`, and watch its events: they are part of this task's HTTP request."""
        watch = _current.get()
        traceparent = "" if watch is None or watch.span is None else traceparent_of(watch.span)
        job = output.job.traced_by(traceparent) if traceparent else output.job
        arrived_s = time.perf_counter() if watch is None else watch.arrived_s
        watched = JobWatch(start(job.requests), output, self.counts, arrived_s, self._on_end)
        if watch is not None:
            watch.jobs.append(watched)
            if watch.span is not None:
                self._describe(watch.span, watch.path, job)
        return watched

    def end(self, watch: HttpWatch) -> None:
        """The response to an HTTP request has ended, or its client is gone."""
        counts, job = self.counts, watch.jobs[-1] if watch.jobs else None
        counts.in_flight -= 1
        counts.responses[watch.status] = counts.responses.get(watch.status, 0) + 1
        if job is None and watch.method == "POST" and (failure := _failure(watch.status)) is not None:
            counts.jobs += 1
            counts.failed[failure] += 1
        took_s = time.perf_counter() - watch.arrived_s
        level = logging.DEBUG if watch.path in PROBES else logging.INFO
        if logger.isEnabledFor(level):
            self._log(level, watch, job, took_s)
        if watch.span is not None:
            _end_span(watch.span, watch, job, took_s)

    def _log(self, level: int, watch: HttpWatch, job: JobWatch | None, took_s: float) -> None:
        tokens = "" if job is None else f", {job.num_prompt} + {job.num_output} tokens"
        fields = {
            "method": watch.method,
            "path": watch.path,
            "status": watch.status,
            "duration_ms": round(1000 * took_s, 1),
            "request_id": watch.request_id,
        }
        if job is not None:
            fields |= {"prompt_tokens": job.num_prompt, "generated_tokens": job.num_output}
            fields |= {"cached_tokens": job.num_cached, "finish_reasons": job.reasons}
        said = "%s %s %d in %.1f ms%s [%s]"
        told = (watch.method, watch.path, watch.status, 1000 * took_s, tokens, watch.request_id)
        logger.log(level, said, *told, extra={FIELDS: fields})

    def _describe(self, span: Span, path: str, job: GenerationJob) -> None:
        sampling = job.choices[0].request.sampling
        chats = any(word in path for word in CHATS)
        span.set_attribute("gen_ai.operation.name", "chat" if chats else "text_completion")
        span.set_attribute("gen_ai.request.model", self.model)
        span.set_attribute("gen_ai.request.id", job.job_id)
        span.set_attribute("gen_ai.request.choice.count", len(job.choices))
        span.set_attribute("gen_ai.request.temperature", sampling.temperature)
        span.set_attribute("gen_ai.request.top_p", sampling.top_p)
        if sampling.max_tokens is not None:
            span.set_attribute("gen_ai.request.max_tokens", sampling.max_tokens)


class Watching:
    """ASGI: gives each request an id, which its response tells, and has it observed. Outside of everything else.

    A failure that nothing inside has answered is answered here, so that this response has an id, too.
    """

    def __init__(
        self,
        app: ASGIApp,
        observation: Observation,
        path_of: Callable[[Scope], str],
        on_error: Callable[[Scope, Exception], ASGIApp],
        tells_id: bool,
    ) -> None:
        """`tells_id`: false where a proxy before us puts the id into responses."""
        self._app, self._observation, self._path_of = app, observation, path_of
        self._on_error, self._tells_id = on_error, tells_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watch = self._observation.begin(scope, self._path_of(scope))
        tokens = _current.set(watch), current_request_id.set(watch.request_id)
        sending = self._sending(watch, send)
        try:
            await self._answer(watch, scope, receive, sending)
        finally:
            _current.reset(tokens[0])
            current_request_id.reset(tokens[1])
            self._observation.end(watch)

    async def _answer(self, watch: HttpWatch, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            if watch.status:
                raise
            await self._on_error(scope, error)(scope, receive, send)

    def _sending(self, watch: HttpWatch, send: Send) -> Callable[[Message], Awaitable[None]]:
        own_id = (REQUEST_ID, watch.request_id.encode())

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                watch.status = message["status"]
                if self._tells_id:
                    message = {**message, "headers": [*message.get("headers", ()), own_id]}
            await send(message)

        return sending


def accepted_id(asked: bytes | None) -> str:
    """The id that a client gave its request, if it is 1 to 128 printable ASCII characters, else one of our own."""
    return asked.decode() if asked is not None and _ACCEPTED_ID.fullmatch(asked) else uuid.uuid4().hex


def _failure(status: int) -> str | None:
    return "generation" if status >= 500 else _FAILURES.get(status)


def _end_span(span: Span, watch: HttpWatch, job: JobWatch | None, took_s: float) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("http.request.method", watch.method)
    span.set_attribute("url.path", watch.path)
    span.set_attribute("http.response.status_code", watch.status)
    span.set_attribute("moe_ray.request_id", watch.request_id)
    if job is not None:
        span.set_attribute("gen_ai.usage.input_tokens", job.num_prompt)
        span.set_attribute("gen_ai.usage.output_tokens", job.num_output)
        span.set_attribute("gen_ai.response.finish_reasons", job.reasons)
        span.set_attribute("gen_ai.latency.e2e", took_s)
        if job.first_token_s is not None:
            span.set_attribute("gen_ai.latency.time_to_first_token", job.first_token_s)
    if watch.status >= 500 or watch.status == 0 or (job is not None and "error" in job.reasons):
        span.set_status(StatusCode.ERROR)
    span.end()
