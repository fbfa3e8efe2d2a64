"""POST /v1/responses: from a body to an answer, whole, streamed or left to the background."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from starlette.responses import JSONResponse, Response, StreamingResponse

from moe_ray.api import sse
from moe_ray.api.generation import EventSource, ResponseStream, collect
from moe_ray.api.job import ModelLimits
from moe_ray.api.output import JobOutput
from moe_ray.api.responses.background import BackgroundResponses, replay, stored_form
from moe_ray.api.responses.conversation import Item, new_id
from moe_ray.api.responses.memory import RUNNING, ResponseStore, StoredResponse
from moe_ray.api.responses.parse import PlannedResponse, of_this_api, parse_request, plan_response
from moe_ray.api.responses.render import GrowingResponse, ResponseEvents
from moe_ray.api.service import HttpOptions, ServedModel, degraded
from moe_ray.errors import InvalidRequest, NotReady, Overloaded

logger = logging.getLogger(__name__)

NOTHING_KEPT: Final = "this server keeps no responses (gateway.responses_memory_mib is 0)"

NOT_FOUND: Final = "previous_response_not_found"


@dataclass(frozen=True, slots=True)
class _Begun:
    """A response whose tokens are being computed."""

    events: ResponseEvents
    output: JobOutput
    session: EventSource
    items: str
    """JSON of the items of its input."""


async def create(service: ServedModel, background: BackgroundResponses | None, raw: bytes) -> Response:
    """Answer one request. Raises errors of moe_ray.errors."""
    body = parse_request(raw)
    asked = service.check_model(body.model)
    service = asked.model
    for name in ("store", "background"):
        if getattr(body, name) and service.responses is None:
            raise InvalidRequest(f"`{name}` is not supported: {NOTHING_KEPT}", name)
    history = await _history(service.responses, body.previous_response_id)

    def make(limits: ModelLimits) -> PlannedResponse:
        return plan_response(body, history, service.tokenizer, limits, new_id("resp"))

    planned = await service.parse(len(raw) + len(sse.dumps(history)), make)
    store = None if body.store is False else service.responses
    output, session = service.start(planned.job.with_adapter(asked.adapter))
    echo = {**planned.echo, "model": asked.name, "store": store is not None}
    response = GrowingResponse(output, echo, service.tokenizer, "queued" if body.background else "in_progress")
    obfuscate = body.stream_options is not None and body.stream_options.include_obfuscation
    events = ResponseEvents(response, partial(of_this_api, body=body), obfuscate)
    begun = _Begun(events, output, session, sse.dumps(planned.items))
    try:
        if body.background and store is not None and background is not None:
            return await _leave(begun, store, background, body.stream, service.options.keep_alive_s)
        if body.stream:
            return await _stream(begun, store, service.options)
        await collect(output, session, response.take)
    except BaseException as error:
        session.close()
        if isinstance(error, InvalidRequest):
            raise of_this_api(error, body) from None
        raise
    response.end()
    await _keep(begun, store)
    return JSONResponse(response.whole(), headers=degraded(output))


def stored_body(stored: StoredResponse) -> Response:
    """A stored response as an HTTP response."""
    return Response(stored.response, media_type="application/json")


def event_stream(events: AsyncIterator[str], headers: dict[str, str] | None = None) -> Response:
    """A response of server-sent events."""
    return StreamingResponse(events, media_type=sse.MEDIA_TYPE, headers={**sse.HEADERS, **(headers or {})})


async def _history(store: ResponseStore | None, previous_id: str | None) -> list[Item]:
    """The items of the conversation that a request goes on from."""
    if previous_id is None:
        return []
    field = "previous_response_id"
    if store is None:
        raise InvalidRequest(f"Previous response with id '{previous_id}' not found: {NOTHING_KEPT}.", field, NOT_FOUND)
    line = await store.conversation(previous_id)
    missing = line[-1].previous_id if line else previous_id
    if missing is not None:
        raise InvalidRequest(f"Previous response with id '{missing}' not found.", field, NOT_FOUND)
    if line[0].status in RUNNING:
        raise InvalidRequest(f"The response '{previous_id}' is still {line[0].status}: wait for its end.", field)
    items: list[Item] = []
    for stored in reversed(line):
        items += json.loads(stored.input_items)
        items += json.loads(stored.response)["output"]
    return items


async def _keep(begun: _Begun, store: ResponseStore | None) -> None:
    """Store a response that has ended, and let it say so if that cannot be."""
    response = begun.events.response
    if store is None:
        return
    try:
        response.echo["store"] = await store.put(stored_form(response, begun.items))
    except NotReady as error:
        logger.warning("response %s is not stored: %s", response.response_id, error)
        response.echo["store"] = False


async def _stream(begun: _Begun, store: ResponseStore | None, options: HttpOptions) -> Response:
    """The events of a response as it is computed; it ends when its client is gone."""
    opening = begun.events.opening("created", "in_progress")
    stream = ResponseStream(begun.output, begun.session, begun.events, options.keep_alive_s)
    await stream.open(options.headers_within_s)

    async def told() -> AsyncIterator[str]:
        try:
            yield "".join(opening)
            async with contextlib.aclosing(stream.body()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            begun.session.close()
        await _keep(begun, store)
        yield begun.events.last()

    return event_stream(told(), degraded(begun.output))


async def _leave(
    begun: _Begun, store: ResponseStore, background: BackgroundResponses, streamed: bool, keep_alive_s: float
) -> Response:
    """Let a response be computed in the background, and tell how it begins."""
    response = begun.events.response
    opening: list[str] | None = None
    if streamed:
        opening = begun.events.opening("created", "queued")
        response.status = "in_progress"
        opening += begun.events.opening("in_progress")
    stored = stored_form(response, begun.items)
    if not await store.begin(stored, opening):
        raise Overloaded("Too many responses are computed in the background. Please try again later.")
    background.start(begun.events, begun.output, begun.session, begun.items, streamed)
    if streamed:
        return event_stream(replay(store, response.response_id, -1, keep_alive_s))
    return stored_body(stored)
