"""The served model as every API sees it: a tokenizer, limits, and sessions that turn a job into a response."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse

from moe_ray.api import sse
from moe_ray.api.generation import ResponseStream, StreamRenderer, collect
from moe_ray.api.job import GenerationJob, ModelLimits
from moe_ray.api.output import JobOutput
from moe_ray.errors import ModelNotFound
from moe_ray.gateway.sessions import Sessions
from moe_ray.text.tokenizer import Tokenizer

LONG_BODY = 16_384
"""Bodies longer than this many bytes are tokenized on another thread, so that running streams do not stall."""
TRUNK_TIMEOUT_S = 5.0
"""How long a request waits for a first trunk before it is told 503."""
DEGRADED_HEADER = "x-moe-degraded"
"""How many tokens, of those computed before the headers went out, lacked one of their experts."""

_T = TypeVar("_T")


class Renderer(StreamRenderer, Protocol):
    """How one API writes responses to jobs."""

    def whole(self) -> dict[str, Any]:
        """The response to a finished job that is not streamed."""
        ...


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """What the operator says about HTTP."""

    api_keys: Sequence[str] = ()
    """Requests must show one of them as a bearer token; none: every request is served."""
    retry_after_s: int = 1
    cors_origins: Sequence[str] = ()
    headers_within_s: float = 1.0
    keep_alive_s: float = 5.0
    page: bool = True
    """Browsers get the page at `/`."""


class ServedModel:
    """One model over its trunks. Runs on the loop of its `Sessions`."""

    def __init__(
        self, served_name: str, tokenizer: Tokenizer, sessions: Sessions, options: HttpOptions | None = None
    ) -> None:
        self.served_name = served_name
        self.tokenizer = tokenizer
        self.options = options or HttpOptions()
        self.created = int(time.time())
        self._sessions = sessions

    async def missing(self) -> list[str] | None:
        """Parts of the model that are not up: `Trunk`, `Expert3`, …; None once requests are served."""
        statuses = await self._sessions.status()
        if any(status.ready for status in statuses):
            return None
        return sorted({name for status in statuses for name in status.missing}) or ["Trunk"]

    async def health(self) -> Response:
        """200 once a trunk and every expert are up, else 503 naming what is missing."""
        missing = await self.missing()
        if missing is None:
            return JSONResponse({"status": "ok"})
        headers = {"Retry-After": str(self.options.retry_after_s)}
        return JSONResponse({"status": "not ready", "missing": missing}, 503, headers)

    @property
    def num_requests(self) -> int:
        """HTTP requests whose sequences have not all ended."""
        return self._sessions.num_open

    @property
    def max_model_len(self) -> int | None:
        """Of the trunk that takes the longest sequences; None without a trunk."""
        return max((trunk.max_model_len for trunk in self._sessions.trunks), default=None)

    def check_model(self, requested: str | None) -> None:
        """Raise `ModelNotFound` unless a request names the served model, or none."""
        if requested is not None and requested != self.served_name:
            raise ModelNotFound(f"The model `{requested}` does not exist.")

    async def parse(self, body_bytes: int, parse: Callable[[ModelLimits], _T]) -> _T:
        """Run `parse`, which tokenizes a body of so many bytes, against the model's limits. Raises `NotReady`, too."""
        trunk = await self._sessions.ensure_trunk(TRUNK_TIMEOUT_S)
        limits = ModelLimits(self.tokenizer.vocab_size, trunk.max_model_len)
        return await asyncio.to_thread(parse, limits) if body_bytes > LONG_BODY else parse(limits)

    async def respond(self, job: GenerationJob, make_renderer: Callable[[JobOutput], Renderer]) -> Response:
        """Generate and answer, whole or streamed. Raises what the job fails with before its response has begun."""
        output = JobOutput.of(job, self.tokenizer)
        renderer = make_renderer(output)
        session = self._sessions.open(job.requests)
        if not job.stream:
            await collect(output, session)
            return JSONResponse(renderer.whole(), headers=_degraded(output))
        stream = ResponseStream(output, session, renderer, self.options.keep_alive_s)
        await stream.open(self.options.headers_within_s)
        headers = {**sse.HEADERS, **_degraded(output)}
        return StreamingResponse(stream.body(), media_type=sse.MEDIA_TYPE, headers=headers)


def _degraded(output: JobOutput) -> dict[str, str]:
    return {DEGRADED_HEADER: str(output.num_degraded)} if output.num_degraded else {}
