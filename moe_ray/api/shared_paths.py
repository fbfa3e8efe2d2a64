"""Paths that more than one API has: what the body, or the client, asks for decides which one answers.

A new owner of `/tokenize` or `/invocations` is a row here: the field of a body that is its own, and its function.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import FastAPI, Request
from pydantic_core import from_json
from starlette.responses import Response

from moe_ray.api.body import read_body
from moe_ray.api.health import health_response
from moe_ray.api.openai.parse import parse_chat, parse_completion
from moe_ray.api.openai.render import ChatRenderer, CompletionRenderer
from moe_ray.api.openai.routes import answer
from moe_ray.api.openai.schemas import ChatRequest, CompletionRequest
from moe_ray.api.openapi import events_of, json_body
from moe_ray.api.service import ServedModel
from moe_ray.api.tgi import routes as tgi
from moe_ray.api.tgi.schemas import TgiCompatBody, TgiErrorBody, TgiGenerateBody, TgiStreamEvent, TgiTokens
from moe_ray.errors import InvalidRequest

Answer = Callable[[ServedModel, bytes], Awaitable[Response]]


async def _chat(service: ServedModel, raw: bytes) -> Response:
    return await answer(service, raw, parse_chat, ChatRenderer)


async def _completion(service: ServedModel, raw: bytes) -> Response:
    return await answer(service, raw, parse_completion, CompletionRenderer)


TOKENIZE: Final[dict[str, Answer]] = {"inputs": tgi.tokenize}
"""Field of a body of POST /tokenize → what answers it."""
INVOCATIONS: Final[dict[str, Answer]] = {"inputs": tgi.compat, "messages": _chat, "prompt": _completion}
"""Field of a body of POST /invocations → what answers it."""


def add_routes(app: FastAPI, service: ServedModel) -> None:
    """Add the routes to `app`; they answer from `service`."""
    limit = service.options.tgi.payload_limit_bytes

    @app.post(
        "/tokenize",
        openapi_extra=json_body(TgiGenerateBody),
        responses={200: {"model": TgiTokens}, 413: {"model": TgiErrorBody}, 422: {"model": TgiErrorBody}},
    )
    async def tokenize(request: Request) -> Response:
        """The tokens of a text: TGI's answer to a body with `inputs`."""
        raw = await read_body(request, limit)
        return await _owner(TOKENIZE, raw)(service, raw)

    @app.post(
        "/invocations",
        openapi_extra=json_body(TgiCompatBody, ChatRequest, CompletionRequest),
        responses={
            200: {"description": "As the API of the body answers", "content": events_of(TgiStreamEvent)},
            **tgi.FAILURES,
        },
    )
    async def invocations(request: Request) -> Response:
        """A body of TGI's, of chat completions or of completions, as SageMaker sends them."""
        raw = await read_body(request, limit)
        return await _owner(INVOCATIONS, raw)(service, raw)


def add_root(app: FastAPI, service: ServedModel) -> None:
    """Add `GET /` for programs. A page for browsers at `/` is added before it."""

    @app.get("/", responses={503: {"description": "A part of the model is missing"}})
    async def root() -> Response:
        """As /health."""
        return await health_response(service)


def _owner(owners: dict[str, Answer], raw: bytes) -> Answer:
    """What answers a body. Raises `InvalidRequest` for one with no owner's field."""
    try:
        body = from_json(raw)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body is not a JSON object")
    for field, found in owners.items():
        if field in body:
            return found
    raise InvalidRequest(f"the body must have {' or '.join(f'`{field}`' for field in owners)}")
