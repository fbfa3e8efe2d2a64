"""Requests that change the house: what they must bring so that no other web page can send them, and their bodies."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Final, TypeVar
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, StrictInt, StrictStr, ValidationError
from starlette.requests import Request

from moe_ray.api.documented import Documented
from moe_ray.errors import Forbidden, InvalidRequest

HEADER: Final = "x-moe-ray-page"
"""A browser sends it to another origin only after that origin's consent, which we never give."""


class ScaleBody(Documented):
    """Body of POST /house/scale."""

    model_config = ConfigDict(extra="forbid")

    expert: Annotated[StrictInt, Field(ge=0)]
    replicas: Annotated[StrictInt, Field(ge=1)] | None
    """null: as many as the policy decides."""


class KillBody(Documented):
    """Body of POST /house/kill."""

    model_config = ConfigDict(extra="forbid")

    replica_id: StrictStr


Body = TypeVar("Body", ScaleBody, KillBody)


def check_origin(request: Request, has_keys: bool) -> None:
    """Raise `Forbidden` unless a request comes from the page of this very server, or from a program that says so.

    A browser names the page's origin, and it is ours; where there are no keys to show, the server is asked for by its
    address, since a foreign name may have been made to point here (DNS rebinding).
    """
    headers = request.headers
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Forbidden("the content type must be application/json")
    if HEADER not in headers:
        raise Forbidden(f"the header {HEADER} is missing")
    host = headers.get("host", "")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        raise Forbidden("the request comes from a page of another origin")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Forbidden("the request comes from another site")
    if not has_keys and not _is_address(host):
        raise Forbidden("without API keys, replicas are changed only through the server's address, such as 127.0.0.1")


def _is_address(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def parse(kind: type[Body], raw: bytes) -> Body:
    """Read a body. Raises `InvalidRequest` naming the field."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        said = f"`{field}`: {first['msg']}" if field else f"The body is not a valid JSON object: {first['msg']}"
        raise InvalidRequest(said, field) from None
