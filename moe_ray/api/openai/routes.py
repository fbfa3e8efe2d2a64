"""The routes of OpenAI's API."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from moe_ray import __version__
from moe_ray.api.job import GenerationJob, ModelLimits
from moe_ray.api.openai.parse import parse_chat, parse_completion, to_job
from moe_ray.api.openai.render import ChatRenderer, CompletionRenderer, OpenAIRenderer
from moe_ray.api.openai.schemas import Body
from moe_ray.api.openai.tokenize import (
    DetokenizeResponse,
    TokenizeResponse,
    detokenize,
    parse_detokenize,
    parse_tokenize,
    tokenize,
)
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

    @app.post("/tokenize", response_model_exclude_none=True)
    async def tokens(request: Request) -> TokenizeResponse:
        """Token ids of a text or a conversation."""
        raw = await request.body()
        body = parse_tokenize(raw)
        service.check_model(body.model)
        return await service.parse(len(raw), partial(tokenize, body, service.tokenizer))

    @app.post("/detokenize")
    async def text(request: Request) -> DetokenizeResponse:
        """The text of token ids."""
        raw = await request.body()
        body = parse_detokenize(raw)
        service.check_model(body.model)
        return await service.parse(len(raw), partial(detokenize, body, service.tokenizer))

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of moe_ray."""
        return {"version": __version__}

    @app.get("/load")
    async def load() -> dict[str, int]:
        """Requests that this gateway works on."""
        return {"server_load": service.num_requests}

    @app.get("/ping")
    @app.post("/ping", include_in_schema=False)
    async def ping() -> Response:
        """As GET /health, for load balancers that ask this path."""
        return await service.health()

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
        "sampling_defaults": service.tokenizer.sampling_defaults,  # ours: what a request leaves out
    }
