"""Drives one job from its token events to a response, whole or streamed. Knows no API and no trunk."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from moe_ray.api import sse
from moe_ray.api.output import Delta, JobOutput
from moe_ray.core import TokenEvent
from moe_ray.errors import MoeRayError

logger = logging.getLogger(__name__)


class EventSource(Protocol):
    """The token events of a job's sequences, e.g. a `gateway.sessions.Session`."""

    async def next(self, timeout_s: float | None) -> tuple[int, TokenEvent] | None:
        """The next (choice index, event); None when none came within `timeout_s`.

        Raises `EngineError` when every sequence has ended.
        """
        ...

    def stop(self, index: int) -> None:
        """End one sequence early. Idempotent."""
        ...

    def close(self) -> None:
        """End every sequence. Idempotent."""
        ...


class StreamRenderer(Protocol):
    """How one API writes a stream. Each method returns whole server-sent events, "" for none."""

    def chunk(self, delta: Delta) -> str:
        """What one step added."""
        ...

    def completed(self) -> str:
        """What follows the last chunk of a stream without a failure."""
        ...

    def failed(self, error: Exception) -> str:
        """What a client is told when the stream fails midway."""
        ...

    def closing(self) -> str:
        """What ends every stream, failed ones too."""
        ...


def _unread(delta: Delta) -> None:
    """What a step added is in the output."""


async def collect(output: JobOutput, source: EventSource, on_delta: Callable[[Delta], object] = _unread) -> None:
    """Fill `output` until every choice is finished, then end its sequences. Raises what the first one failed with.

    `on_delta` is told each step's.
    """
    try:
        for delta in output.finish_empty():
            on_delta(delta)
        while output.num_unfinished:
            if (step := await _step(output, source, None)) is not None:
                on_delta(step)
    finally:
        source.close()


class ResponseStream:
    """A response as server-sent events. First `open` it, then read `body` to its end or close it; each once."""

    def __init__(
        self,
        output: JobOutput,
        source: EventSource,
        renderer: StreamRenderer,
        keep_alive_s: float,
        keep_alive: str = sse.KEEP_ALIVE,
    ) -> None:
        """`keep_alive` is sent whenever the stream says nothing for `keep_alive_s` seconds."""
        self._output, self._source, self._renderer = output, source, renderer
        self._keep_alive_s = keep_alive_s
        self._keep_alive = keep_alive
        self._opening = ""

    async def open(self, within_s: float) -> None:
        """Wait for the first chunk, `within_s` at most; until then a failure is raised, and can be an HTTP status.

        After it the response's headers should go out: `body` begins at once.
        """
        end = time.monotonic() + within_s
        try:
            self._opening = "".join(map(self._renderer.chunk, self._output.finish_empty()))
            while not self._opening and self._output.num_unfinished and (left := end - time.monotonic()) > 0:
                self._opening = self._render(await _step(self._output, self._source, left))
        except BaseException:
            self._source.close()
            raise

    async def body(self) -> AsyncGenerator[str, None]:
        """Yield the events. A failure is an event, too, and the closing follows it. Ends the sequences when closed."""
        try:
            yield self._opening or self._keep_alive
            while self._output.num_unfinished:
                delta = await _step(self._output, self._source, self._keep_alive_s)
                if text := self._keep_alive if delta is None else self._renderer.chunk(delta):
                    yield text
            yield self._renderer.completed()
        except Exception as error:
            if not isinstance(error, MoeRayError):
                logger.exception("stream %s failed", self._output.job.job_id)
            yield self._renderer.failed(error)
        finally:
            self._source.close()
        yield self._renderer.closing()

    def _render(self, delta: Delta | None) -> str:
        return "" if delta is None else self._renderer.chunk(delta)


async def _step(output: JobOutput, source: EventSource, timeout_s: float | None) -> Delta | None:
    """Take the next event into `output`; None when none came in time."""
    while (told := await source.next(timeout_s)) is not None:
        index, event = told
        delta = output.take(index, event)
        if delta is not None:
            if delta.finish_reason is not None and not event.last:
                source.stop(index)  # a stop string: the engine would go on
            return delta
    return None
