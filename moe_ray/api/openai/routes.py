"""The routes of OpenAI's API."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from moe_ray.api.job import GenerationJob, ModelLimits
from moe_ray.api.openai.parse import parse_chat, parse_completion, to_job
from moe_ray.api.openai.render import ChatRenderer, CompletionRenderer, OpenAIRenderer
from moe_ray.api.openai.schemas import Body
from moe_ray.api.service import ServedModel


def add_routes(app: FastAPI, service: ServedModel) -> None:
    """Add the routes to `app`; they answer from `service`."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model, in OpenAI's list format."""
        return {"object": "list", "data": [_card(service)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One model card; 404 for a model that is not served."""
        service.check_model(model)
        return _card(service)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Text completions, whole or streamed."""
        return await _answer(service, await request.body(), parse_completion, CompletionRenderer)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Chat completions, whole or streamed."""
        return await _answer(service, await request.body(), parse_chat, ChatRenderer)


async def _answer(
    service: ServedModel, raw: bytes, parse: Callable[[bytes], Body], renderer: type[OpenAIRenderer]
) -> Response:
    """Answer one request. Raises errors of moe_ray.errors."""
    body = parse(raw)
    service.check_model(body.model)
    job_id = renderer.id_prefix + uuid.uuid4().hex

    def make(limits: ModelLimits) -> GenerationJob:
        return to_job(body, service.tokenizer, limits, job_id)

    job = await service.parse(len(raw), make)
    return await service.respond(job, partial(renderer, tokenizer=service.tokenizer, model=service.served_name))


def _card(service: ServedModel) -> dict[str, Any]:
    return {
        "id": service.served_name,
        "object": "model",
        "created": service.created,
        "owned_by": "moe_ray",
        "root": service.served_name,
        "parent": None,
        "max_model_len": service.max_model_len,
    }
