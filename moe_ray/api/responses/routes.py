"""The routes of OpenAI's Responses."""

from __future__ import annotations

import json
from typing import Final

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from moe_ray.api.openai.answers import OpenAIError
from moe_ray.api.openapi import events_of, json_body
from moe_ray.api.responses.answers import (
    DeletedResponse,
    InputItemPage,
    ResponseObject,
    ResponseStreamEvent,
)
from moe_ray.api.responses.background import BackgroundResponses, replay
from moe_ray.api.responses.create import create, event_stream, stored_body
from moe_ray.api.responses.memory import ResponseStore, StoredResponse
from moe_ray.api.responses.queries import ItemsQuery, RetrieveQuery, page_of, parse_query, query_parameters
from moe_ray.api.responses.schemas import ResponsesRequest
from moe_ray.api.route_answers import answers
from moe_ray.api.service import ServedModel
from moe_ray.errors import InvalidRequest, ResponseNotFound

STORED: Final = (400, 404, 500)
"""What may become of a request for a stored response."""


def add_routes(app: FastAPI, service: ServedModel) -> None:
    """Add the routes to `app`; they answer from `service`."""
    background = None if service.responses is None else BackgroundResponses(service.responses)

    @app.post(
        "/v1/responses",
        openapi_extra=json_body(ResponsesRequest),
        responses=answers(ResponseObject, OpenAIError, events_of(ResponseStreamEvent)),
    )
    async def create_response(request: Request) -> Response:
        """An answer to a conversation: whole, streamed, or computed in the background."""
        return await create(service, background, await request.body())

    @app.get(
        "/v1/responses/{response_id}",
        openapi_extra=query_parameters(RetrieveQuery),
        responses=answers(ResponseObject, OpenAIError, events_of(ResponseStreamEvent), STORED),
    )
    async def retrieve_response(response_id: str, request: Request) -> Response:
        """A stored response; of a background stream, its events."""
        query = parse_query(RetrieveQuery, request.query_params.multi_items())
        store, stored = await _stored(service, response_id)
        if not query.stream:
            if query.starting_after is not None:
                raise InvalidRequest("`starting_after` is only allowed when `stream` is true", "starting_after")
            return stored_body(stored)
        if await store.events(response_id, -1, 0) is None:
            raise InvalidRequest("Only a response created with `background` and `stream` can be streamed.", "stream")
        after = -1 if query.starting_after is None else query.starting_after
        return event_stream(replay(store, response_id, after, service.options.keep_alive_s))

    @app.delete("/v1/responses/{response_id}", responses=answers(DeletedResponse, OpenAIError, statuses=STORED))
    async def delete_response(response_id: str) -> Response:
        """Forget a response, and stop it if it is being computed."""
        store, _ = await _stored(service, response_id)
        await store.delete(response_id)
        if background is not None:
            background.stop(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @app.post("/v1/responses/{response_id}/cancel", responses=answers(ResponseObject, OpenAIError, statuses=STORED))
    async def cancel_response(response_id: str) -> Response:
        """Stop a response in the background. One that has ended stays as it is."""
        store, stored = await _stored(service, response_id)
        if not json.loads(stored.response)["background"]:
            raise InvalidRequest("Cannot cancel a synchronous response.", "response_id")
        stopped = await store.cancel(response_id)
        if background is not None:
            background.stop(response_id)
        return stored_body(stopped or stored)

    @app.get(
        "/v1/responses/{response_id}/input_items",
        openapi_extra=query_parameters(ItemsQuery),
        responses=answers(InputItemPage, OpenAIError, statuses=STORED),
    )
    async def list_input_items(response_id: str, request: Request) -> Response:
        """The items of a response's own input, the last one first."""
        query = parse_query(ItemsQuery, request.query_params.multi_items())
        _, stored = await _stored(service, response_id)
        return JSONResponse(page_of(json.loads(stored.input_items), query))


async def _stored(service: ServedModel, response_id: str) -> tuple[ResponseStore, StoredResponse]:
    """A response and where it is kept; raises `ResponseNotFound`."""
    store = service.responses
    stored = None if store is None else await store.get(response_id)
    if store is None or stored is None:
        raise ResponseNotFound(f"Response with id '{response_id}' not found.")
    return store, stored
