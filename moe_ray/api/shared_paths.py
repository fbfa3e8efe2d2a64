"""Paths that more than one API has: what the body, or the client, asks for decides which one answers.

A further owner of `/tokenize` or `/invocations` is a row here: a field that only its bodies have, its function, and the
API whose errors it speaks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from fastapi import FastAPI, Request
from pydantic_core import from_json
from starlette.responses import Response

from moe_ray.api.body import read_body
from moe_ray.api.health_answers import HEALTH, Unhealthy
from moe_ray.api.openai.answers import ChatChunk, ChatCompletionAnswer, CompletionAnswer, CompletionChunk, OpenAIError
from moe_ray.api.openai.routes import answer_chat, answer_completion, answer_tokenize
from moe_ray.api.openai.schemas import ChatRequest, CompletionRequest
from moe_ray.api.openai.tokenize import TokenizeRequest, TokenizeResponse
from moe_ray.api.openapi import events_of, json_body
from moe_ray.api.page import routes as page
from moe_ray.api.route_answers import answers, failures
from moe_ray.api.service import ServedModel
from moe_ray.api.tgi import routes as tgi
from moe_ray.api.tgi.schemas import (
    TgiCompatBody,
    TgiErrorBody,
    TgiGenerateBody,
    TgiGeneratedList,
    TgiStreamEvent,
    TgiTokens,
)
from moe_ray.errors import InvalidRequest

EITHER_ERROR: Final = TgiErrorBody | OpenAIError
INVOKED: Final = events_of(TgiStreamEvent, TgiErrorBody, ChatChunk, CompletionChunk, OpenAIError, last="[DONE]")
SPEAKS: Final = "speaks"
"""Key of a request's state: the name of the API whose errors it gets."""


@dataclass(frozen=True, slots=True)
class Owner:
    """One API's share of a path."""

    field: str
    """A body with it is this API's."""
    answer: Callable[[ServedModel, bytes], Awaitable[Response]]
    speaks: str


TOKENIZE: Final = (
    Owner("inputs", tgi.tokenize, "tgi"),
    Owner("messages", answer_tokenize, "openai"),
    Owner("prompt", answer_tokenize, "openai"),
)
INVOCATIONS: Final = (
    Owner("inputs", tgi.compat, "tgi"),
    Owner("messages", answer_chat, "openai"),
    Owner("prompt", answer_completion, "openai"),
)


def add_routes(app: FastAPI, service: ServedModel) -> None:
    """Add the routes to `app`; they answer from `service`."""
    limit = service.options.tgi.payload_limit_bytes

    @app.post(
        "/tokenize",
        openapi_extra=json_body(TgiGenerateBody, TokenizeRequest),
        responses={
            **answers(TgiTokens | TokenizeResponse, EITHER_ERROR, statuses=(500,)),
            **failures(OpenAIError, 400, 404),
            **failures(OpenAIError, 413),
            **failures(TgiErrorBody, 422, 424),
        },
    )
    async def tokenize(request: Request) -> Response:
        """The tokens of a text (TGI's `inputs`, vLLM's `prompt`) or of a conversation (`messages`)."""
        return await _owned(TOKENIZE, service, request, await read_body(request, limit))

    @app.post(
        "/invocations",
        openapi_extra=json_body(TgiCompatBody, ChatRequest, CompletionRequest),
        responses={
            **answers(
                TgiGeneratedList | ChatCompletionAnswer | CompletionAnswer,
                EITHER_ERROR,
                INVOKED,
                statuses=(429, 500),
            ),
            **failures(OpenAIError, 400, 404),
            **failures(TgiErrorBody, 413, 422, 424),
        },
    )
    async def invocations(request: Request) -> Response:
        """A body of TGI's, of chat completions or of completions, as SageMaker sends them."""
        return await _owned(INVOCATIONS, service, request, await read_body(request, limit))


def add_root(app: FastAPI, service: ServedModel) -> None:
    """Add `GET /`: the page for browsers, where there is one, and for programs what TGI answers there."""

    @app.get(
        "/",
        responses={
            200: {**HEALTH[200], "content": {"text/html": {"schema": {"type": "string"}}}},
            304: {"description": "The page is as the client has it"},
            **failures(TgiErrorBody, 401),
            **failures(Unhealthy | TgiErrorBody, 503),
        },
    )
    async def root(request: Request) -> Response:
        """The page, for a client that accepts text/html; as /health for others."""
        if service.options.page and page.wants_page(request):
            return page.page(request)
        return await service.health()


async def _owned(owners: tuple[Owner, ...], service: ServedModel, request: Request, raw: bytes) -> Response:
    """The answer of the API whose body this is. Raises `InvalidRequest` for one of none."""
    try:
        body = from_json(raw)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body is not a JSON object")
    owner = next((owner for owner in owners if body.get(owner.field) is not None), None)
    if owner is None:
        fields = [owner.field for owner in owners]
        raise InvalidRequest(f"the body must have one of {', '.join(f'`{field}`' for field in fields)}", fields[-1])
    setattr(request.state, SPEAKS, owner.speaks)
    return await owner.answer(service, raw)
