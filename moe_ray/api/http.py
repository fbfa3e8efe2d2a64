"""The gateway's HTTP application: every API's routes, and what holds for all: authorisation, errors, CORS."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Final

import fastapi
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from moe_ray import __version__
from moe_ray.api import models, shared_paths
from moe_ray.api.anthropic import errors as anthropic_errors
from moe_ray.api.anthropic import routes as anthropic_routes
from moe_ray.api.document import describe
from moe_ray.api.failure import Failure, failure_of
from moe_ray.api.health_answers import HEALTH
from moe_ray.api.in_flight import InFlight
from moe_ray.api.load_answers import ExpertsLoad
from moe_ray.api.metrics_route import EXPOSITION, metrics_route
from moe_ray.api.observation import REQUEST_ID, Watching
from moe_ray.api.ollama import errors as ollama_errors
from moe_ray.api.ollama import routes as ollama_routes
from moe_ray.api.openai import adapter_routes
from moe_ray.api.openai import errors as openai_errors
from moe_ray.api.openai import routes as openai_routes
from moe_ray.api.openai.answers import OpenAIError
from moe_ray.api.page import routes as page_routes
from moe_ray.api.page.house import House
from moe_ray.api.responses import routes as responses_routes
from moe_ray.api.route_answers import answers
from moe_ray.api.service import DEGRADED_HEADER, HttpOptions, ServedModel
from moe_ray.api.tgi import errors as tgi_errors
from moe_ray.api.tgi import routes as tgi_routes
from moe_ray.errors import MoeRayError, Unauthorized

logger = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset({"/health", "/ping", "/metrics"})
"""What is answered without a key: probes and Prometheus have none. No text of a request is in it."""


@dataclass(frozen=True, slots=True)
class Api:
    """One API: a folder beside this file."""

    name: str
    prefix: str
    """Errors on paths that begin so are in its format."""
    add_routes: Callable[[fastapi.FastAPI, ServedModel], None]
    error_body: Callable[[Failure], dict[str, Any]]
    header: str = ""
    """So are errors of requests with this header, whatever their path."""
    paths: frozenset[str] = frozenset()
    """Further paths whose errors are in its format."""
    status: Callable[[Failure], int] = attrgetter("status")
    """The status that it gives a failure."""


_TGI_PATHS: Final = frozenset({"/", "/chat_tokenize", "/invocations", "/vertex", "/info"})
APIS: Final = (
    Api("responses", "/v1/responses", responses_routes.add_routes, openai_errors.error_body),
    Api(
        "anthropic",
        "/v1/messages",
        anthropic_routes.add_routes,
        anthropic_errors.error_body,
        anthropic_routes.VERSION_HEADER,
    ),
    Api("ollama", "/api/", ollama_routes.add_routes, ollama_errors.error_body),
    Api("tgi", "/generate", tgi_routes.add_routes, tgi_errors.error_body, "", _TGI_PATHS, tgi_errors.status),
    Api("openai", "/", openai_routes.add_routes, openai_errors.error_body),
)
"""The first that fits says how an error looks; the last fits all."""


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
        return _error_json(request.scope, failure, getattr(error, "headers", None) or {})

    app.add_exception_handler(MoeRayError, on_error)
    for status in (404, 405):
        app.add_exception_handler(status, on_no_route)

    @app.get("/health", responses=HEALTH)
    async def health() -> Response:
        """200 once a trunk and every expert are up, else 503 naming what is missing."""
        return await service.health()

    @app.get("/experts", responses=answers(ExpertsLoad, OpenAIError, statuses=(500,)))
    async def experts() -> dict[str, Any]:
        """What each expert's replicas did in the last 10 s; an empty list with `transport: local`."""
        return await expert_load()

    metrics = metrics_route(service, expert_load)
    app.add_api_route("/metrics", metrics, response_class=Response, responses=EXPOSITION)
    app.add_route("/metrics", metrics, methods=["HEAD"], include_in_schema=False)
    models.add_routes(app, service)
    adapter_routes.add_routes(app, service)
    for api in APIS:
        api.add_routes(app, service)
    shared_paths.add_routes(app, service)
    shared_paths.add_root(app, service)
    if options.page:
        page_routes.add_routes(app, service, house)
    describe(app, service.served_name, OPEN_PATHS, has_keys=bool(options.api_keys))
    app.add_middleware(Authorisation, options=options)
    if options.cors_origins:  # outside of authorisation: a browser asks for permission without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", DEGRADED_HEADER, REQUEST_ID.decode()],
        )
    app.add_middleware(TrailingSlash)
    answer_error = partial(_error_response, retry_after_s=options.retry_after_s)
    if options.max_ongoing_requests is not None:
        app.add_middleware(InFlight, most=options.max_ongoing_requests, path_of=_path, on_error=answer_error)
    app.add_middleware(
        Watching,
        observation=service.observation,
        path_of=_path,
        on_error=answer_error,
        tells_id=options.tells_request_id,
    )
    return app


class Authorisation:
    """Lets pass what shows one of the API keys, and what is open to all; everything, where there are no keys."""

    def __init__(self, app: ASGIApp, options: HttpOptions) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in options.api_keys]
        self._retry_after_s = options.retry_after_s
        self._page = options.page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        try:
            self._check(dict(scope["headers"]))
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

    def _check(self, headers: dict[bytes, bytes]) -> None:
        """Check a request's headers in constant time. Raises `Unauthorized`."""
        if not self._api_keys:
            return
        bearer, plain = headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
        # Every key is compared: how long it takes says nothing about which one was nearly right.
        fits = [
            hmac.compare_digest(bearer, b"Bearer " + key) | hmac.compare_digest(plain, key) for key in self._api_keys
        ]
        if not sum(fits):
            said = "Incorrect API key provided." if bearer or plain else "No API key provided."
            raise Unauthorized(
                f"{said} Send one of the server's keys as `Authorization: Bearer KEY` or `x-api-key: KEY`."
            )


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
    path, told = _path(scope), scope.get("state", {}).get(shared_paths.SPEAKS)
    if told is not None:  # the body of a path that APIs share has said it
        return next(api for api in APIS if api.name == told)
    shown = {name.decode("latin-1") for name, _ in scope["headers"]}
    fits = (api for api in APIS if path.startswith(api.prefix) or path in api.paths or api.header in shown)
    return next(fits, APIS[-1])


def _error_response(scope: Scope, error: Exception, retry_after_s: int) -> Response:
    """The response to a request that failed; an unforeseen error is logged and told without its internals."""
    failure = failure_of(error, retry_after_s)
    if failure.status == 500:
        logger.error("request failed", exc_info=error)
    return _error_json(scope, failure, failure.headers)


def _error_json(scope: Scope, failure: Failure, headers: Mapping[str, str]) -> Response:
    api = _api_of(scope)
    body = api.error_body(failure)
    headers = dict(headers)
    if request_id := body.get("request_id"):
        headers["request-id"] = request_id
        logger.info("request %s: %d %s", request_id, failure.status, failure.message)
    return JSONResponse(body, api.status(failure), headers)
