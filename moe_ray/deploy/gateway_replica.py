"""The Serve ingress: routes, each one line to `Service`."""

# Serve pickles the ingress class by value, together with the globals that exist when `serve.ingress` runs, and
# rebuilds its routes elsewhere. So there is no `from __future__ import annotations` here (FastAPI reads the types
# anew), nothing is defined below the class, and what the routes do lives in another module.

from collections.abc import Sequence

import fastapi
import psutil
import ray
from fastapi.responses import Response
from ray import serve
from ray.serve.handle import DeploymentHandle

from moe_ray import __version__, telemetry
from moe_ray.api.openai.protocol import parse_chat, parse_completion
from moe_ray.api.service import Service, error_response, no_route
from moe_ray.config import Config
from moe_ray.deploy.discovery import ask_each, discover_trunks
from moe_ray.deploy.link_options import link_options
from moe_ray.deploy.load_overview import overview
from moe_ray.errors import MoeRayError
from moe_ray.gateway.sessions import Sessions
from moe_ray.hub import resolve_model
from moe_ray.text.tokenizer import Tokenizer

app = fastapi.FastAPI(title="moe_ray", version=__version__)


@app.exception_handler(MoeRayError)
async def _known_error(_: fastapi.Request, error: MoeRayError) -> Response:
    return error_response(error)


@app.exception_handler(Exception)
async def _unknown_error(_: fastapi.Request, error: Exception) -> Response:
    return error_response(error)


@app.exception_handler(404)
async def _no_route(request: fastapi.Request, _: Exception) -> Response:
    return no_route(request.method, request.url.path, 404)


@app.exception_handler(405)
async def _no_method(request: fastapi.Request, _: Exception) -> Response:
    return no_route(request.method, request.url.path, 405)


@serve.ingress(app)
class Gateway:
    """One gateway replica."""

    async def __init__(  # type: ignore[misc]
        self, config: Config, trunk: DeploymentHandle, experts: Sequence[DeploymentHandle]
    ) -> None:
        telemetry.configure(config.log_level)
        sessions = Sessions(discover_trunks(trunk), link_options(config), config.experts.deadline_s)
        sessions.start()
        self._service = Service(config.served_name, Tokenizer(resolve_model(config)), sessions, config.gateway.api_keys)
        self._experts = experts

    async def status(self) -> dict:
        """Place and memory of this process; asked over Serve, not HTTP."""
        node_id = ray.get_runtime_context().get_node_id()
        return {**telemetry.process_status(psutil.Process()), "node_id": node_id}

    @app.get("/health")
    async def health(self) -> Response:
        """200 once a trunk and every expert are up, else 503 naming what is missing."""
        return await self._service.health()

    @app.get("/experts")
    async def experts(self, request: fastapi.Request) -> dict:
        """What each expert's replicas did in the last 10 s; an empty list with `transport: local`."""
        self._service.authorize(request.headers.get("authorization"))
        names = [handle.deployment_name for handle in self._experts]
        return overview(dict(zip(names, await ask_each(self._experts, "load"), strict=True)))

    @app.get("/v1/models")
    async def models(self, request: fastapi.Request) -> dict:
        """The served model, in OpenAI's list format."""
        self._service.authorize(request.headers.get("authorization"))
        return self._service.models()

    @app.get("/v1/models/{model:path}")
    async def model(self, model: str, request: fastapi.Request) -> dict:
        """One model card; 404 for a model that is not served."""
        self._service.authorize(request.headers.get("authorization"))
        return self._service.model(model)

    @app.post("/v1/completions")
    async def completions(self, request: fastapi.Request) -> Response:
        """OpenAI's text completions, whole or streamed."""
        self._service.authorize(request.headers.get("authorization"))
        return await self._service.answer(await request.body(), parse_completion, "cmpl-")

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: fastapi.Request) -> Response:
        """OpenAI's chat completions, whole or streamed."""
        self._service.authorize(request.headers.get("authorization"))
        return await self._service.answer(await request.body(), parse_chat, "chatcmpl-")
