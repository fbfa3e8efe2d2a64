"""The served model as every API sees it: a tokenizer, limits, and sessions that turn a job into a response."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Protocol, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse

from moe_ray.api import sse
from moe_ray.api.generation import EventSource, ResponseStream, StreamRenderer, collect
from moe_ray.api.job import GenerationJob, ModelLimits
from moe_ray.api.observation import Observation
from moe_ray.api.output import JobOutput
from moe_ray.api.responses.memory import ResponseStore
from moe_ray.api.tgi.limits import TgiLimits
from moe_ray.core import AdapterEntry, AdapterRef
from moe_ray.errors import InvalidRequest, ModelNotFound
from moe_ray.gateway.sessions import Sessions
from moe_ray.model.checkpoint_facts import CheckpointFacts, checkpoint_facts
from moe_ray.observe.exposition import ModelTold
from moe_ray.text.tokenizer import Tokenizer

LONG_BODY = 16_384
"""Bodies longer than this many bytes are tokenized on another thread, so that running streams do not stall."""
TRUNK_TIMEOUT_S = 5.0
"""How long a request waits for a first trunk before it is told 503."""
DEGRADED_HEADER = "x-moe-degraded"
"""How many tokens, of those computed before the headers went out, lacked one of their experts."""
UNNAMED: Final = ("tgi", "dummy")
"""Names that stand for the served model: Hugging Face's clients send them where they know a URL alone."""

_T = TypeVar("_T")


class Renderer(StreamRenderer, Protocol):
    """How one API writes responses to jobs."""

    def whole(self) -> Any:
        """The response to a finished job that is not streamed."""
        ...


@dataclass(frozen=True, slots=True)
class StreamForm:
    """How an API streams."""

    media_type: str
    keep_alive: str
    """What a silent stream sends: nothing that a client takes for a part of the answer."""


SSE: Final = StreamForm(sse.MEDIA_TYPE, sse.KEEP_ALIVE)


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """What the operator says about HTTP."""

    api_keys: Sequence[str] = ()
    """Requests must show one of them, as a bearer token or in `x-api-key`; none: every request is served."""
    retry_after_s: int = 1
    cors_origins: Sequence[str] = ()
    headers_within_s: float = 1.0
    keep_alive_s: float = 5.0
    tgi: TgiLimits = field(default_factory=TgiLimits)
    tells_request_id: bool = True
    """False where a proxy before us puts the request's id into responses."""
    page: bool = True
    """Browsers get the page at `/`."""
    max_ongoing_requests: int | None = None
    """Most requests in flight, beyond that 503; None where a proxy before us sees to it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks to generate with."""

    name: str
    """What responses call it."""
    model: ServedModel
    """Which of the served ones."""
    adapter: AdapterRef | None = None


class ServedModel:
    """One model over its trunks, and what is served beside it. Runs on the loop of its `Sessions`."""

    def __init__(
        self,
        served_name: str,
        tokenizer: Tokenizer,
        sessions: Sessions,
        options: HttpOptions | None = None,
        aliases: Sequence[str] = (),
        observation: Observation | None = None,
        responses: ResponseStore | None = None,
        open_adapter: Callable[[str], AdapterRef] | None = None,
        variants: Sequence[ServedModel] = (),
    ) -> None:
        """`aliases` are further names that requests may use; in them `*` stands for anything.

        `responses` keeps what clients of /v1/responses may ask for again; None: nothing is kept. `open_adapter` checks
        the adapter of a source, which takes a moment, and raises `AdapterError`; None: clients may not add any.
        `variants`: further models, each over its own trunks, that requests to this one may name.
        """
        self.observation = observation or Observation(served_name)
        self.served_name = served_name
        self.aliases = tuple(aliases)
        self.tokenizer = tokenizer
        self.options = options or HttpOptions()
        self.responses = responses
        self.open_adapter = open_adapter
        self.created = int(time.time())
        self._sessions = sessions
        self._variants = {variant.served_name: variant for variant in variants}

    @property
    def models(self) -> list[ServedModel]:
        """This model and its variants."""
        return [self, *self._variants.values()]

    async def missing(self) -> list[str] | None:
        """Parts of the models that are not up: `Trunk`, `Expert3`, …; None once requests to each are served."""
        found = await self._own_missing("Trunk")
        for name, variant in self._variants.items():
            found |= await variant._own_missing(f"Trunk-{name}")
        return sorted(found) or None

    async def _own_missing(self, trunk: str) -> set[str]:
        """The same of this model alone, whose trunks are called `trunk`."""
        statuses = await self._sessions.status()
        if any(status.ready for status in statuses):
            return set()
        return {name for status in statuses for name in status.missing} or {trunk}

    async def health(self) -> Response:
        """200 once a trunk and every expert are up, else 503 naming what is missing."""
        missing = await self.missing()
        if missing is None:
            return JSONResponse({"status": "ok"})
        headers = {"Retry-After": str(self.options.retry_after_s)}
        says = {"status": "not ready", "missing": missing, "error": "unhealthy", "error_type": "healthcheck"}
        return JSONResponse(says, 503, headers)

    @property
    def num_requests(self) -> int:
        """HTTP requests whose sequences have not all ended."""
        return sum(model._sessions.num_open for model in self.models)

    def told(self) -> ModelTold:
        """What metrics tell of this model: its counts, and what each linked trunk last said of itself."""
        return ModelTold(self.served_name, self.observation.counts, self._sessions.told())

    @property
    def max_model_len(self) -> int | None:
        """Of the trunk that takes the longest sequences; None without a trunk."""
        return max((trunk.max_model_len for trunk in self._sessions.trunks), default=None)

    @property
    def names(self) -> list[str]:
        """The names that can be listed: the served one, aliases without a `*`, the variants', the adapters'."""
        adapters = (entry.name for entry in self._sessions.adapters)
        return [self.served_name, *(alias for alias in self.aliases if "*" not in alias), *self._variants, *adapters]

    def adapter(self, name: str) -> AdapterEntry | None:
        """The adapter that is served under a name; None: none is, or the name is the model's own."""
        return None if self._is_own(name) else self._sessions.find_adapter(name)

    def add_adapter(self, name: str, adapter: AdapterRef) -> None:
        """Serve an adapter under a name. Raises `InvalidRequest` where something is served under it."""
        if self._is_own(name) or name in self._variants or self._sessions.find_adapter(name) is not None:
            raise InvalidRequest(f"The lora adapter '{name}' has already been loaded.", "lora_name")
        self._sessions.add_adapter(name, adapter)

    def remove_adapter(self, name: str) -> None:
        """Serve an adapter no longer. Raises `ModelNotFound`."""
        entry = self._sessions.find_adapter(name)
        if entry is None:
            raise ModelNotFound(f"The lora adapter '{name}' cannot be found.")
        self._sessions.remove_adapter(entry)

    @cached_property
    def facts(self) -> CheckpointFacts:
        """What the checkpoint is. Raises `CheckpointError`."""
        return checkpoint_facts(self.tokenizer.directory)

    def check_model(self, requested: str | None) -> Asked:
        """What a request asks for: this model by one of its names, or by none, a variant or an adapter by its own.

        Raises `ModelNotFound` for any other name.
        """
        if requested in self._variants:
            return Asked(requested, self._variants[requested])
        if requested is None or self._is_own(requested):
            return Asked(self.served_name, self)
        entry = self._sessions.find_adapter(requested)
        if entry is None:
            raise ModelNotFound(f"The model `{requested}` does not exist.")
        return Asked(entry.name, self, entry.ref)

    def _is_own(self, name: str) -> bool:
        """Whether a name is the model's."""
        if name in (self.served_name, *UNNAMED):
            return True
        patterns = (re.escape(alias).replace(r"\*", ".*") for alias in self.aliases)
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    async def parse(self, body_bytes: int, parse: Callable[[ModelLimits], _T]) -> _T:
        """Run `parse`, which tokenizes a body of so many bytes, against the model's limits. Raises `NotReady`, too."""
        trunk = await self._sessions.ensure_trunk(TRUNK_TIMEOUT_S)
        limits = ModelLimits(self.tokenizer.vocab_size, trunk.max_model_len)
        return await self.tokenize(body_bytes, lambda: parse(limits))

    async def tokenize(self, body_bytes: int, work: Callable[[], _T]) -> _T:
        """Run `work`, which tokenizes a body of so many bytes: here, or on another thread where it is long."""
        return await asyncio.to_thread(work) if body_bytes > LONG_BODY else work()

    async def finish(self, job: GenerationJob) -> JobOutput:
        """Generate all of a job that is not streamed. Raises what it fails with."""
        output, events = self.start(job)
        await collect(output, events)
        return output

    def start(self, job: GenerationJob) -> tuple[JobOutput, EventSource]:
        """Begin to generate: what its choices become, and their events. Close the events when its client is gone."""
        output = JobOutput.of(job, self.tokenizer)
        return output, self._events_of(output)

    async def respond(
        self,
        job: GenerationJob,
        make_renderer: Callable[[JobOutput], Renderer],
        extra_headers: Mapping[str, str] | None = None,
        stream_form: StreamForm = SSE,
    ) -> Response:
        """Generate and answer, whole or streamed. Raises what the job fails with before its response has begun."""
        output = JobOutput.of(job, self.tokenizer)
        renderer = make_renderer(output)  # first: some tell how long it took from now on
        events = self._events_of(output)
        if not job.stream:
            await collect(output, events)
            return JSONResponse(renderer.whole(), headers={**(extra_headers or {}), **degraded(output)})
        stream = ResponseStream(output, events, renderer, self.options.keep_alive_s, stream_form.keep_alive)
        await stream.open(self.options.headers_within_s)
        headers = {**(extra_headers or {}), **sse.HEADERS, **degraded(output)}
        return StreamingResponse(stream.body(), media_type=stream_form.media_type, headers=headers)

    def _events_of(self, output: JobOutput) -> EventSource:
        return self.observation.open(output, self._sessions.open)


def degraded(output: JobOutput) -> dict[str, str]:
    """The header that says so where tokens lacked one of their experts."""
    return {DEGRADED_HEADER: str(output.num_degraded)} if output.num_degraded else {}
