"""The routes of ollama's API."""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import Any, Final

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from moe_ray import __version__
from moe_ray.api.job import GenerationJob, ModelLimits
from moe_ray.api.ollama.model_cards import loaded_cards, model_cards, shown
from moe_ray.api.ollama.parse import loads_only, parse_body, parse_chat, parse_generate, plain_name, to_job
from moe_ray.api.ollama.render import MEDIA_TYPE, ChatLinesRenderer, GenerateRenderer, OllamaRenderer, now
from moe_ray.api.ollama.schemas import (
    OllamaAnswer,
    OllamaChat,
    OllamaError,
    OllamaGenerate,
    OllamaGenerated,
    OllamaModels,
    OllamaName,
    OllamaPulled,
    OllamaShown,
    OllamaVersion,
)
from moe_ray.api.openapi import json_body, lines_of
from moe_ray.api.route_answers import ANYWHERE, answers, failures
from moe_ray.api.service import ServedModel, StreamForm
from moe_ray.api.sse import dumps
from moe_ray.errors import InvalidRequest

API_VERSION: Final = "0.12.11"
"""The release of ollama whose API this is: the last one with a field that is answered here (`logprobs`)."""
_NOTHING: Final[dict[str, dict[str, Any]]] = {
    "/api/generate": {"response": ""},
    "/api/chat": {"message": {"role": "assistant", "content": ""}},
}
"""What an answer without text says."""
_UNSUPPORTED: Final = {
    "/api/create": "this server makes no models",
    "/api/copy": "this server names its model when it starts (--served-model-name)",
    "/api/push": "this server uploads no models",
    "/api/embed": "this model does not support embeddings",
    "/api/embeddings": "this model does not support embeddings",
}


def add_routes(app: FastAPI, service: ServedModel) -> None:
    """Add the routes to `app`; they answer from `service`."""
    _add_answers(app, service)
    _add_facts(app, service)
    _add_refusals(app, service)


def _add_answers(app: FastAPI, service: ServedModel) -> None:
    @app.post(
        "/api/generate",
        openapi_extra=json_body(OllamaGenerate),
        responses=answers(OllamaGenerated, OllamaError, lines_of(MEDIA_TYPE, OllamaGenerated, OllamaError)),
    )
    async def generate(request: Request) -> Response:
        """The answer to one prompt, in lines unless `stream` is false."""
        received_s = time.monotonic()
        raw = await request.body()
        return await _answer(service, parse_generate(raw), len(raw), GenerateRenderer, "/api/generate", received_s)

    @app.post(
        "/api/chat",
        openapi_extra=json_body(OllamaChat),
        responses=answers(OllamaAnswer, OllamaError, lines_of(MEDIA_TYPE, OllamaAnswer, OllamaError)),
    )
    async def chat(request: Request) -> Response:
        """The next turn of a conversation, in lines unless `stream` is false."""
        received_s = time.monotonic()
        raw = await request.body()
        return await _answer(service, parse_chat(raw), len(raw), ChatLinesRenderer, "/api/chat", received_s)


def _add_facts(app: FastAPI, service: ServedModel) -> None:
    @app.head("/", response_class=Response, responses={status: {"description": "As of GET"} for status in ANYWHERE})
    async def alive() -> Response:
        """The server runs: what ollama's clients ask first."""
        return Response()

    @app.get("/api/version", responses=answers(OllamaVersion, OllamaError, statuses=()))
    async def version() -> dict[str, Any]:
        """The version of ollama's API, and of this server."""
        return {"version": API_VERSION, "moe_ray": __version__}

    @app.get("/api/tags", responses=answers(OllamaModels, OllamaError, statuses=(500,)))
    async def tags() -> dict[str, Any]:
        """The served model under each of its names."""
        return {"models": model_cards(service)}

    @app.get("/api/ps", responses=answers(OllamaModels, OllamaError, statuses=(500,)))
    async def ps() -> dict[str, Any]:
        """The same, once requests are served."""
        return {"models": [] if await service.missing() else loaded_cards(service)}

    @app.post(
        "/api/show",
        openapi_extra=json_body(OllamaName),
        responses=answers(OllamaShown, OllamaError, statuses=(400, 404, 500)),
    )
    async def show(request: Request) -> dict[str, Any]:
        """What the model is: its shape, its template, what it can do."""
        body = _named(service, await request.body())
        return shown(service.check_model(plain_name(body.model or body.name)).model)


def _add_refusals(app: FastAPI, service: ServedModel) -> None:
    """What manages ollama's store of models, of which this server has none."""

    @app.post(
        "/api/pull",
        openapi_extra=json_body(OllamaName),
        responses=answers(OllamaPulled, OllamaError, lines_of(MEDIA_TYPE, OllamaPulled), (400, 404)),
    )
    async def pull(request: Request) -> Response:
        """Says that the served model is there; others are not fetched."""
        body = _named(service, await request.body())
        done = {"status": "success"}
        return Response(f"{dumps(done)}\n", media_type=MEDIA_TYPE) if body.stream else JSONResponse(done)

    @app.delete("/api/delete", status_code=400, responses=failures(OllamaError, 400, *ANYWHERE))
    async def delete() -> Response:
        """Always refused."""
        raise InvalidRequest("this server deletes no models")

    def refuse(path: str) -> None:
        @app.post(path, name=path, status_code=400, responses=failures(OllamaError, 400, *ANYWHERE))
        async def refused() -> Response:
            """Always refused."""
            raise InvalidRequest(_UNSUPPORTED[path])

    for path in _UNSUPPORTED:
        refuse(path)


def _named(service: ServedModel, raw: bytes) -> OllamaName:
    body = parse_body(OllamaName, raw)
    if not (body.model or body.name):
        raise InvalidRequest("model: is required", "model")
    service.check_model(plain_name(body.model or body.name))
    return body


async def _answer(
    service: ServedModel,
    body: OllamaGenerate | OllamaChat,
    body_bytes: int,
    renderer: type[OllamaRenderer],
    path: str,
    received_s: float,
) -> Response:
    """Answer one request. Raises errors of moe_ray.errors."""
    asked = service.check_model(plain_name(body.model))
    service = asked.model
    empty = {"model": body.model, "created_at": now(), **_NOTHING[path]}
    if loads_only(body):
        done = {**empty, "done": True, "done_reason": "load"}
        return Response(f"{dumps(done)}\n", media_type=MEDIA_TYPE) if body.stream else JSONResponse(done)
    job_id = f"ollama-{uuid.uuid4().hex}"

    def make(limits: ModelLimits) -> GenerationJob:
        return to_job(body, service.tokenizer, limits, job_id).with_adapter(asked.adapter)

    job = await service.parse(body_bytes, make)
    # Nothing but a part of the answer can be a line of it: one that says nothing.
    waiting = StreamForm(MEDIA_TYPE, f"{dumps({**empty, 'done': False})}\n")
    make_renderer = partial(renderer, tokenizer=service.tokenizer, model=body.model, received_s=received_s)
    try:
        return await service.respond(job, make_renderer, stream_form=waiting)
    except InvalidRequest as error:
        if error.param != "grammar":
            raise
        field = "format" if body.form else "tools"
        raise InvalidRequest(str(error).replace("`grammar`", f"`{field}`"), field) from None
