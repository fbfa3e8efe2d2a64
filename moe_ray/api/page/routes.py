"""The page, which `shared_paths` sends at `/`: its files, what it shows of the house, what it may change there."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from moe_ray.api.openai.answers import OpenAIError
from moe_ray.api.openapi import json_body
from moe_ray.api.page.answers import HouseSeen, Killed, Scaled
from moe_ray.api.page.control import KillBody, ScaleBody, check_origin, parse
from moe_ray.api.page.files import HEADERS, INDEX, PageFile, index, page_files
from moe_ray.api.page.house import Glance, House
from moe_ray.api.route_answers import answers
from moe_ray.api.service import ServedModel

FOLDER: Final = "/page/"
CHANGED: Final = (400, 403, 500)
"""What may become of a request that changes something, unless it is done."""


def is_file(scope: Scope, path: str) -> bool:
    """Whether a request is for the page itself, which holds nothing of the model: it is sent without a key."""
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return False
    return path.startswith(FOLDER) or (path == "/" and wants_page(Request(scope)))


def wants_page(request: Request) -> bool:
    """Whether the client is a browser that asks for a page: its Accept header names text/html."""
    kinds = (kind.partition(";")[0].strip().lower() for kind in request.headers.get("accept", "").split(","))
    return "text/html" in kinds


def add_routes(app: FastAPI, service: ServedModel, house: House | None) -> None:
    """Add the routes to `app`. Without a `house` the page is a chat alone; what changes it is there if it says so."""

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        """One of the page's files."""
        found = page_files().get(name)
        if found is None or name == INDEX:
            return Response("no such file", 404, media_type="text/plain")
        return _send(request, found)

    if house is not None:
        _add_house(app, house, has_keys=bool(service.options.api_keys))


def page(request: Request) -> Response:
    """The page itself."""
    return _send(request, index(request.scope.get("root_path", "").rstrip("/")))


def _add_house(app: FastAPI, house: House, *, has_keys: bool) -> None:
    glance = Glance(house.look)

    @app.get("/house", responses=answers(HouseSeen, OpenAIError, statuses=(500,)))
    async def look() -> Response:
        """Trunks and experts of this moment, at most a second old."""
        return JSONResponse(await glance(), headers={"Cache-Control": "no-store"})

    if not house.control:
        return

    @app.post(
        "/house/scale", openapi_extra=json_body(ScaleBody), responses=answers(Scaled, OpenAIError, statuses=CHANGED)
    )
    async def scale(request: Request) -> dict[str, Any]:
        """Set the replicas of an expert. Answers before they run."""
        check_origin(request, has_keys)
        body = parse(ScaleBody, await request.body())
        await house.scale(body.expert, body.replicas)
        glance.forget()
        return {"expert": body.expert, "replicas": body.replicas}

    @app.post(
        "/house/kill", openapi_extra=json_body(KillBody), responses=answers(Killed, OpenAIError, statuses=CHANGED)
    )
    async def kill(request: Request) -> dict[str, Any]:
        """Kill the process of a replica."""
        check_origin(request, has_keys)
        body = parse(KillBody, await request.body())
        await house.kill(body.replica_id)
        glance.forget()
        return {"replica_id": body.replica_id}


def _send(request: Request, file: PageFile) -> Response:
    headers = {**HEADERS, "ETag": file.etag, "Vary": "Accept"}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
