"""The routes of Anthropic's Messages API."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any, Final

from fastapi import FastAPI, Request
from starlette.responses import Response

from moe_ray.api import sse
from moe_ray.api.anthropic.errors import new_request_id
from moe_ray.api.anthropic.parse import count, grammar_field, parse_count, parse_messages, to_job
from moe_ray.api.anthropic.render import PING, MessageRenderer
from moe_ray.api.anthropic.schemas import (
    MessageAnswer,
    MessageError,
    MessageEvent,
    MessagesRequest,
    MessageTokens,
    PromptRequest,
)
from moe_ray.api.job import GenerationJob, ModelLimits
from moe_ray.api.openapi import events_of, json_body
from moe_ray.api.route_answers import answers
from moe_ray.api.service import ServedModel, StreamForm
from moe_ray.errors import InvalidRequest

VERSION_HEADER: Final = "anthropic-version"
"""Anthropic's clients send it with every request; any version is taken for the one there is."""
_STREAM: Final = StreamForm(sse.MEDIA_TYPE, PING)


def add_routes(app: FastAPI, service: ServedModel) -> None:
    """Add the routes to `app`; they answer from `service`."""

    @app.post(
        "/v1/messages",
        openapi_extra=json_body(MessagesRequest),
        responses=answers(MessageAnswer, MessageError, events_of(MessageEvent)),
    )
    async def messages(request: Request) -> Response:
        """The next turn of a conversation, whole or streamed."""
        raw = await request.body()
        body = parse_messages(raw)
        asked = service.check_model(body.model)
        served = asked.model
        job_id = f"msg_{uuid.uuid4().hex}"
        request_id = new_request_id()

        def make(limits: ModelLimits) -> GenerationJob:
            return to_job(body, served.tokenizer, limits, job_id).with_adapter(asked.adapter)

        job = await served.parse(len(raw), make)
        renderer = partial(MessageRenderer, model=asked.name, max_tokens=body.max_tokens, request_id=request_id)
        try:
            return await served.respond(job, renderer, {"request-id": request_id}, _STREAM)
        except InvalidRequest as error:
            raise _named(error, grammar_field(body)) from None

    @app.post(
        "/v1/messages/count_tokens",
        openapi_extra=json_body(PromptRequest),
        responses=answers(MessageTokens, MessageError, statuses=(400, 404, 500)),
    )
    async def count_tokens(request: Request) -> dict[str, Any]:
        """How many tokens the prompt of such a conversation has. Nothing is computed."""
        raw = await request.body()
        body = parse_count(raw)
        served = service.check_model(body.model).model
        return {"input_tokens": await served.tokenize(len(raw), lambda: count(body, served.tokenizer))}


def _named(error: InvalidRequest, field: str) -> InvalidRequest:
    """The trunk's refusal of a grammar, by what the client called it."""
    return InvalidRequest(str(error).replace("`grammar`", f"`{field}`"), field) if error.param == "grammar" else error
