"""The HTTP side: OpenAI's API on Ray Serve. Knows text and token ids, never tensors."""

# No `from __future__ import annotations` here: Serve rebuilds the routes, and FastAPI then reads these types anew.

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from moe_ray import __version__, telemetry
from moe_ray.config import Config
from moe_ray.engine.tokenizer import Tokenizer
from moe_ray.errors import MoeRayError
from moe_ray.hub import resolve_model
from moe_ray.serve.discovery import discover_trunks
from moe_ray.serve.links import link_options
from moe_ray.serve.openai import Body, check_model, error_body, parse_chat, parse_completion, to_requests
from moe_ray.serve.openai_stream import Responder
from moe_ray.serve.sessions import Session, Sessions

logger = logging.getLogger(__name__)

app = fastapi.FastAPI(title="moe_ray", version=__version__)
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
LONG_BODY = 16_384
"""Bodies longer than this many bytes are tokenized on another thread, so that running streams do not stall."""


@app.exception_handler(MoeRayError)
async def _known_error(_: fastapi.Request, error: MoeRayError) -> Response:
    return _error_response(error)


@app.exception_handler(404)
async def _no_route(request: fastapi.Request, _: Exception) -> Response:
    message = f"no route {request.method} {request.url.path}"
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, 404)


@app.exception_handler(Exception)
async def _unknown_error(_: fastapi.Request, error: Exception) -> Response:
    logger.error("request failed", exc_info=error)
    return _error_response(error)


@serve.ingress(app)
class Gateway:
    """One gateway replica."""

    async def __init__(self, config: Config, trunk: DeploymentHandle) -> None:  # type: ignore[misc]
        telemetry.configure(config.log_level)
        self._served_name = config.served_name
        self._created = int(time.time())
        self._tokenizer = Tokenizer(resolve_model(config))
        self._sessions = Sessions(discover_trunks(trunk), link_options(config), config.experts.deadline_s)
        self._sessions.start()

    @app.get("/health")
    async def health(self) -> Response:
        """200 once a trunk and every expert are up, else 503 naming what is missing."""
        statuses = await self._sessions.status()
        if any(status.ready for status in statuses):
            return JSONResponse({"status": "ok"})
        missing = sorted({name for status in statuses for name in status.missing}) or ["Trunk"]
        return JSONResponse({"status": "not ready", "missing": missing}, 503)

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The served model, in OpenAI's list format."""
        trunks = self._sessions.trunks
        card = {
            "id": self._served_name,
            "object": "model",
            "created": self._created,
            "owned_by": "moe_ray",
            "root": self._served_name,
            "parent": None,
            "max_model_len": trunks[0].max_model_len if trunks else None,
        }
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(self, model: str) -> dict[str, Any]:
        """One model card; 404 for a model that is not served."""
        check_model(model, {self._served_name})
        return (await self.models())["data"][0]

    @app.post("/v1/completions")
    async def completions(self, request: fastapi.Request) -> Response:
        """OpenAI's text completions, whole or streamed."""
        return await self._answer(request, parse_completion, "cmpl-")

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: fastapi.Request) -> Response:
        """OpenAI's chat completions, whole or streamed."""
        return await self._answer(request, parse_chat, "chatcmpl-")

    async def _answer(self, request: fastapi.Request, parse: Callable[[bytes], Body], prefix: str) -> Response:
        raw = await request.body()
        response_id = prefix + uuid.uuid4().hex
        body = parse(raw)
        check_model(body.model, {self._served_name})
        trunk = await self._sessions.ensure_trunk(timeout_s=5.0)
        arguments = (body, self._tokenizer, trunk.max_model_len, response_id)
        if len(raw) > LONG_BODY:
            requests = await asyncio.to_thread(to_requests, *arguments)
        else:
            requests = to_requests(*arguments)
        session = self._sessions.open(requests)
        responder = Responder(
            body, requests, self._tokenizer, response_id=response_id, model=self._served_name, on_stop=session.stop
        )
        if not body.stream:
            with contextlib.closing(session):
                return JSONResponse(await responder.full(session.events()))
        chunks = responder.stream(session.events())
        try:
            first = await anext(chunks)  # a request refused by the trunk is still an HTTP status here
        except BaseException:
            session.close()
            raise
        return StreamingResponse(_stream(first, chunks, session), media_type="text/event-stream", headers=SSE_HEADERS)


async def _stream(first: str, chunks: AsyncIterator[str], session: Session) -> AsyncIterator[str]:
    """Yield the rest of a response; when the client goes away its sequences end."""
    with contextlib.closing(session):
        yield first
        async for chunk in chunks:
            yield chunk


def _error_response(error: Exception) -> Response:
    status, body, headers = error_body(error)
    return JSONResponse(body, status, headers)
