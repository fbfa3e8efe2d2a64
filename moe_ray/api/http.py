"""The gateway's HTTP application: every API's routes, and what holds for all: authorisation, errors, CORS."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import fastapi
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from moe_ray import __version__
from moe_ray.api.failure import Failure, failure_of
from moe_ray.api.openai import errors as openai_errors
from moe_ray.api.openai import routes as openai_routes
from moe_ray.api.page import routes as page_routes
from moe_ray.api.page.house import House
from moe_ray.api.service import DEGRADED_HEADER, HttpOptions, ServedModel
from moe_ray.errors import MoeRayError, Unauthorized

logger = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset({"/health", "/ping"})
"""What is answered without a key: probes have none."""


@dataclass(frozen=True, slots=True)
class Api:
    """One API: a folder beside this file."""

    prefix: str
    """Errors on paths that begin so are in its format."""
    add_routes: Callable[[fastapi.FastAPI, ServedModel], None]
    error_body: Callable[[Failure], dict[str, Any]]


APIS: Final = (Api("/", openai_routes.add_routes, openai_errors.error_body),)
"""The first whose prefix fits says how an error looks; the last fits all."""


def build_app(
    service: ServedModel, expert_load: Callable[[], Awaitable[dict[str, Any]]], house: House | None = None
) -> fastapi.FastAPI:
    """The application over one model. `expert_load` answers GET /experts, `house` what the page shows beside the chat.

    Without a `house` the page is a chat alone.
    """
    # The pages at /docs and /redoc would load their scripts from another server.
    app = fastapi.FastAPI(title="moe_ray", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    options = service.options

    async def on_error(request: fastapi.Request, error: Exception) -> Response:
        return _error_response(request.scope, error, options.retry_after_s)

    async def on_no_route(request: fastapi.Request, error: Exception) -> Response:
        status: int = getattr(error, "status_code", 404)
        failure = Failure(status, f"no route {request.method} {_path(request.scope)}")
        return JSONResponse(_api_of(request.scope).error_body(failure), status, getattr(error, "headers", None))

    for kind in (MoeRayError, Exception):
        app.add_exception_handler(kind, on_error)
    for status in (404, 405):
        app.add_exception_handler(status, on_no_route)

    @app.get("/health")
    async def health() -> Response:
        """200 once a trunk and every expert are up, else 503 naming what is missing."""
        return await service.health()

    @app.get("/experts")
    async def experts() -> dict[str, Any]:
        """What each expert's replicas did in the last 10 s; an empty list with `transport: local`."""
        return await expert_load()

    for api in APIS:
        api.add_routes(app, service)
    if options.page:
        page_routes.add_routes(app, service, house)
    app.add_middleware(Authorisation, options=options)
    if options.cors_origins:  # outside of authorisation: a browser asks for permission without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", DEGRADED_HEADER],
        )
    app.add_middleware(TrailingSlash)
    return app


class Authorisation:
    """Lets pass what shows one of the API keys, and what is open to all; everything, where there are no keys."""

    def __init__(self, app: ASGIApp, options: HttpOptions) -> None:
        self._app = app
        self._api_keys = [f"Bearer {key}".encode() for key in options.api_keys]
        self._retry_after_s = options.retry_after_s
        self._page = options.page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        try:
            self._check(dict(scope["headers"]).get(b"authorization"))
        except Unauthorized as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await _error_response(scope, error, self._retry_after_s)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = _path(scope)
        return path in OPEN_PATHS or (self._page and page_routes.is_file(scope, path))

    def _check(self, shown: bytes | None) -> None:
        """Check an Authorization header in constant time. Raises `Unauthorized`."""
        if not self._api_keys:
            return
        # Every key is compared: how long it takes says nothing about which one was nearly right.
        if not sum(hmac.compare_digest(shown or b"", key) for key in self._api_keys):
            said = "Incorrect API key provided." if shown else "No API key provided."
            raise Unauthorized(f"{said} Send one of the server's keys as `Authorization: Bearer KEY`.")


class TrailingSlash:
    """Takes the slashes off a path's end: `GET /v1/models/` is `GET /v1/models`. The application's root keeps one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, root = scope["path"].rstrip("/"), scope.get("root_path", "").rstrip("/")
            if path == root:
                path = f"{root}/"
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)


def _path(scope: Scope) -> str:
    """The path below the prefix under which the application is served."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _api_of(scope: Scope) -> Api:
    return next((api for api in APIS if _path(scope).startswith(api.prefix)), APIS[-1])


def _error_response(scope: Scope, error: Exception, retry_after_s: int) -> Response:
    """The response to a request that failed; an unforeseen error is logged and told without its internals."""
    failure = failure_of(error, retry_after_s)
    if failure.status == 500:
        logger.error("request failed", exc_info=error)
    return JSONResponse(_api_of(scope).error_body(failure), failure.status, dict(failure.headers))
