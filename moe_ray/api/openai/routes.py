"""The routes of OpenAI's API."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Final

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from moe_ray import __version__
from moe_ray.api.health_answers import HEALTH
from moe_ray.api.job import GenerationJob, ModelLimits
from moe_ray.api.openai.answers import (
    ChatChunk,
    ChatCompletionAnswer,
    CompletionAnswer,
    CompletionChunk,
    OpenAIError,
    ServerLoad,
    ServerVersion,
)
from moe_ray.api.openai.chat_render import ChatRenderer
from moe_ray.api.openai.parse import parse_chat, parse_chat_batch, parse_completion, to_job
from moe_ray.api.openai.render import CompletionRenderer, OpenAIRenderer
from moe_ray.api.openai.schemas import BatchChatRequest, Body, ChatRequest, CompletionRequest
from moe_ray.api.openai.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    detokenize,
    parse_detokenize,
    parse_tokenize,
    tokenize,
)
from moe_ray.api.openapi import events_of, json_body
from moe_ray.api.route_answers import answers
from moe_ray.api.service import ServedModel
from moe_ray.errors import InvalidRequest

COMPLETION_EVENTS: Final = events_of(CompletionChunk, OpenAIError, last="[DONE]")
CHAT_EVENTS: Final = events_of(ChatChunk, OpenAIError, last="[DONE]")


def add_routes(app: FastAPI, service: ServedModel) -> None:
    """Add the routes to `app`; they answer from `service`."""

    @app.post(
        "/detokenize",
        openapi_extra=json_body(DetokenizeRequest),
        responses=answers(DetokenizeResponse, OpenAIError, statuses=(400, 404, 500)),
    )
    async def text(request: Request) -> DetokenizeResponse:
        """The text of token ids."""
        raw = await request.body()
        body = parse_detokenize(raw)
        served = service.check_model(body.model).model
        return await served.parse(len(raw), partial(detokenize, body, served.tokenizer))

    @app.get("/version", responses=answers(ServerVersion, OpenAIError, statuses=()))
    async def version() -> dict[str, str]:
        """The version of moe_ray."""
        return {"version": __version__}

    @app.get("/load", responses=answers(ServerLoad, OpenAIError, statuses=()))
    async def load() -> dict[str, int]:
        """Requests that this gateway works on."""
        return {"server_load": service.num_requests}

    @app.get("/ping", responses=HEALTH)
    @app.post("/ping", responses=HEALTH)
    async def ping() -> Response:
        """As GET /health, for load balancers that ask this path."""
        return await service.health()

    @app.post(
        "/v1/completions",
        openapi_extra=json_body(CompletionRequest),
        responses=answers(CompletionAnswer, OpenAIError, COMPLETION_EVENTS),
    )
    async def completions(request: Request) -> Response:
        """Text completions, whole or streamed."""
        return await answer_completion(service, await request.body())

    @app.post(
        "/v1/chat/completions",
        openapi_extra=json_body(ChatRequest),
        responses=answers(ChatCompletionAnswer, OpenAIError, CHAT_EVENTS),
    )
    async def chat_completions(request: Request) -> Response:
        """Chat completions, whole or streamed."""
        return await answer_chat(service, await request.body())

    @app.post(
        "/v1/chat/completions/batch",
        openapi_extra=json_body(BatchChatRequest),
        responses=answers(ChatCompletionAnswer, OpenAIError, CHAT_EVENTS),
    )
    async def chat_completions_of_many(request: Request) -> Response:
        """Chat completions of several conversations in one response."""
        return await answer(service, await request.body(), parse_chat_batch, ChatRenderer)


async def answer(
    service: ServedModel, raw: bytes, parse: Callable[[bytes], Body], renderer: type[OpenAIRenderer]
) -> Response:
    """Answer one request. Raises errors of moe_ray.errors."""
    body = parse(raw)
    asked = service.check_model(body.model)
    service = asked.model
    job_id = renderer.id_prefix + uuid.uuid4().hex

    def make(limits: ModelLimits) -> GenerationJob:
        return to_job(body, service.tokenizer, limits, job_id).with_adapter(asked.adapter)

    job = await service.parse(len(raw), make)
    made = partial(renderer.for_body(body), tokenizer=service.tokenizer, model=asked.name)
    try:
        return await service.respond(job, made)
    except InvalidRequest as error:
        if error.param != "grammar":
            raise
        field = body.grammar_field()  # what the trunk knows as the grammar
        raise InvalidRequest(str(error).replace("`grammar`", f"`{field}`"), field) from None


async def answer_tokenize(service: ServedModel, raw: bytes) -> Response:
    """Answer a body of /tokenize as vLLM does: token ids of a text or a conversation. Raises as `answer`."""
    body = parse_tokenize(raw)
    served = service.check_model(body.model).model
    found = await served.parse(len(raw), partial(tokenize, body, served.tokenizer))
    return JSONResponse(found.model_dump(exclude_none=True))


async def answer_chat(service: ServedModel, raw: bytes) -> Response:
    """Answer a body of /v1/chat/completions. Raises as `answer`."""
    return await answer(service, raw, parse_chat, ChatRenderer)


async def answer_completion(service: ServedModel, raw: bytes) -> Response:
    """Answer a body of /v1/completions. Raises as `answer`."""
    return await answer(service, raw, parse_completion, CompletionRenderer)
