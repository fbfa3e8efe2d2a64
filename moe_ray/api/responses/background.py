"""Responses that are computed while nobody waits: started here, asked for and cancelled by id."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Final

from moe_ray.api import sse
from moe_ray.api.generation import EventSource, ResponseStream
from moe_ray.api.output import JobOutput
from moe_ray.api.responses.memory import RUNNING, ResponseStore, StoredResponse
from moe_ray.api.responses.render import GrowingResponse, ResponseEvents
from moe_ray.errors import NotReady, Overloaded

logger = logging.getLogger(__name__)

HEARD_EVERY_S: Final = 0.5
"""How often the store is told that a response is computed: so long may a cancellation by another gateway take."""
EVENTS_EVERY_S: Final = 0.1
"""How long events are gathered before they are stored."""
FULL: Final = "The memory for stored responses is full (gateway.responses_memory_mib)."


def stored_form(response: GrowingResponse, items: str) -> StoredResponse:
    """What is kept of a response; `items` is the JSON of its request's."""
    previous = response.echo["previous_response_id"]
    return StoredResponse(response.response_id, response.status, sse.dumps(response.whole()), items, previous)


class BackgroundResponses:
    """Those that this gateway computes. For one event loop."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(
        self, events: ResponseEvents, output: JobOutput, session: EventSource, items: str, streamed: bool
    ) -> None:
        """Compute a response that the store knows as begun. `items` is the JSON of its input's."""
        stream = ResponseStream(output, session, events, HEARD_EVERY_S)
        response_id = events.response.response_id
        run = self._run(events, stream, items, streamed)
        task = asyncio.create_task(run, name=response_id)
        self._tasks[response_id] = task

        def ended(_: asyncio.Task[None]) -> None:
            session.close()  # if it was cancelled before it ran
            del self._tasks[response_id]

        task.add_done_callback(ended)

    def stop(self, response_id: str) -> None:
        """End one at once if it is computed here; elsewhere it ends once the store says so."""
        task = self._tasks.get(response_id)
        if task is not None:
            task.cancel()

    async def _run(self, events: ResponseEvents, stream: ResponseStream, items: str, streamed: bool) -> None:
        response = events.response
        try:
            rest = await self._follow(events, stream, streamed)
            if rest is not None:
                last = [*rest, *split_events(events.last())] if streamed else []
                await self._store.finish(stored_form(response, items), last)
        except NotReady as error:
            logger.error("background response %s is lost, for nothing can be stored: %s", response.response_id, error)

    async def _follow(self, events: ResponseEvents, stream: ResponseStream, streamed: bool) -> list[str] | None:
        """Compute to the end, and store the events on the way; those that are left. None: it was told to stop."""
        response = events.response
        waiting: list[str] = []
        stored_at = time.monotonic()
        async with contextlib.aclosing(stream.body()) as pieces:
            async for piece in pieces:
                if piece != sse.KEEP_ALIVE:
                    if response.status == "queued":
                        response.status = "in_progress"
                    waiting += split_events(piece) if streamed else []
                every_s = EVENTS_EVERY_S if waiting else HEARD_EVERY_S
                if response.status not in RUNNING or time.monotonic() - stored_at < every_s:
                    continue
                progress = await self._store.advance(response.response_id, response.status, waiting)
                waiting, stored_at = [], time.monotonic()
                if progress == "stopped":
                    return None
                if progress == "full":
                    return split_events(events.failed(Overloaded(FULL)))
        return waiting


def split_events(text: str) -> list[str]:
    """The events of a piece of a stream, each by itself."""
    return [f"{block}\n\n" for block in text.split("\n\n") if block]


async def replay(store: ResponseStore, response_id: str, after: int, wait_s: float) -> AsyncIterator[str]:
    """Yield the events of a background stream behind number `after`, and those to come, until it ends.

    A comment is sent whenever there is nothing for `wait_s`; an error is the last event where they are gone meanwhile.
    """
    while (news := await store.events(response_id, after, wait_s)) is not None:
        events, ended = news
        after += len(events)
        if events or not ended:
            yield "".join(events) or sse.KEEP_ALIVE
        if ended:
            return
    gone = {
        "type": "error",
        "code": None,
        "message": f"The events of '{response_id}' are not stored any more.",
        "param": None,
    }
    yield f"event: error\n{sse.event({**gone, 'sequence_number': after + 1})}"
