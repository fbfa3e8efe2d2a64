"""What the gateway answers, from request body to response, without Ray: text in, text out, sessions in between."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from moe_ray.api.openai.errors import error_body
from moe_ray.api.openai.protocol import Body, check_model, to_requests
from moe_ray.api.openai.stream import Responder
from moe_ray.errors import Unauthorized
from moe_ray.gateway.sessions import Session, Sessions
from moe_ray.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
LONG_BODY = 16_384
"""Bodies longer than this many bytes are tokenized on another thread, so that running streams do not stall."""
TRUNK_TIMEOUT_S = 5.0
"""How long a request waits for a first trunk before it is told 503."""


class Service:
    """OpenAI's API over one model. Runs on the loop of its `Sessions`."""

    def __init__(
        self, served_name: str, tokenizer: Tokenizer, sessions: Sessions, api_keys: Sequence[str] = ()
    ) -> None:
        self._api_keys = [f"Bearer {key}".encode() for key in api_keys]
        self._served_name, self._tokenizer, self._sessions = served_name, tokenizer, sessions
        self._created = int(time.time())

    def authorize(self, shown: str | None) -> None:
        """Check a request's Authorization header, in constant time. Raises `Unauthorized`."""
        if not self._api_keys:
            return
        # Every key is compared: how long it takes says nothing about which one was nearly right.
        if not sum(hmac.compare_digest((shown or "").encode(), key) for key in self._api_keys):
            said = "Incorrect API key provided." if shown else "No API key provided."
            raise Unauthorized(f"{said} Send one of the server's keys as `Authorization: Bearer KEY`.")

    async def health(self) -> Response:
        """200 once a trunk and every expert are up, else 503 naming what is missing."""
        statuses = await self._sessions.status()
        if any(status.ready for status in statuses):
            return JSONResponse({"status": "ok"})
        missing = sorted({name for status in statuses for name in status.missing}) or ["Trunk"]
        return JSONResponse({"status": "not ready", "missing": missing}, 503)

    def models(self) -> dict[str, Any]:
        """The served model, in OpenAI's list format."""
        return {"object": "list", "data": [self._card()]}

    def model(self, name: str) -> dict[str, Any]:
        """The card of one model. Raises `ModelNotFound`."""
        check_model(name, {self._served_name})
        return self._card()

    async def answer(self, raw: bytes, parse: Callable[[bytes], Body], prefix: str) -> Response:
        """Answer one completion or chat request; `prefix` begins its id. Raises errors of moe_ray.errors."""
        body = parse(raw)
        check_model(body.model, {self._served_name})
        response_id = prefix + uuid.uuid4().hex
        trunk = await self._sessions.ensure_trunk(TRUNK_TIMEOUT_S)
        arguments = (body, self._tokenizer, trunk.max_model_len, response_id)
        requests = await asyncio.to_thread(to_requests, *arguments) if len(raw) > LONG_BODY else to_requests(*arguments)
        session = self._sessions.open(requests)
        responder = Responder(
            body, requests, self._tokenizer, response_id=response_id, model=self._served_name, on_stop=session.stop
        )
        if not body.stream:
            with contextlib.closing(session):
                answer = await responder.full(session.events())
                return JSONResponse(answer, headers=_degraded(responder))
        chunks = responder.stream(session.events())
        try:
            first = await anext(chunks)  # a request that the trunk refuses can still become an HTTP status here
        except BaseException:
            session.close()
            raise
        headers = {**SSE_HEADERS, **_degraded(responder)}
        return StreamingResponse(_stream(first, chunks, session), media_type="text/event-stream", headers=headers)

    def _card(self) -> dict[str, Any]:
        trunks = self._sessions.trunks
        return {
            "id": self._served_name,
            "object": "model",
            "created": self._created,
            "owned_by": "moe_ray",
            "root": self._served_name,
            "parent": None,
            "max_model_len": max((trunk.max_model_len for trunk in trunks), default=None),
        }


def error_response(error: Exception) -> Response:
    """The response to a request that failed; an unforeseen error is logged and told without its internals."""
    status, body, headers = error_body(error)
    if status == 500:
        logger.error("request failed", exc_info=error)
    return JSONResponse(body, status, headers)


def no_route(method: str, path: str, status: int) -> Response:
    """The response to a path or method that does not exist."""
    error = {"message": f"no route {method} {path}", "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status)


def _degraded(responder: Responder) -> dict[str, str]:
    """Says in a header how many tokens, of those computed before the headers go out, lacked one of their experts."""
    return {"x-moe-degraded": str(responder.degraded)} if responder.degraded else {}


async def _stream(first: str, chunks: AsyncIterator[str], session: Session) -> AsyncIterator[str]:
    """Yield the rest of a response; when the client goes away its sequences end."""
    with contextlib.closing(session):
        yield first
        async for chunk in chunks:
            yield chunk
