"""What /openapi.json says of the answers of a route whose answers are written without FastAPI."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, Final

from pydantic import BaseModel

Kind = type[BaseModel] | UnionType
"""What a body may be."""

_FAILURES: Final = {
    400: "A field of the request is wrong or not supported; the message names it",
    401: "No valid API key",
    403: "The request does not come from the page of this server, or the server does not permit it",
    404: "No such model or response",
    413: "The body is too large",
    422: "A field of the request is wrong or not supported; the message names it",
    424: "The answer could not be computed",
    429: "Too many requests wait",
    500: "The server is at fault",
    503: "A part of the model is not there, or too many requests are worked on",
}
ANYWHERE: Final = (401, 503)
"""What may become of every request, probes apart."""
GENERATION: Final = (400, 404, 429, 500)
"""What else may become of a request for tokens."""


def answers(
    answer: Kind, error: Kind, content: Mapping[str, Any] | None = None, statuses: tuple[int, ...] = GENERATION
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route. `content`: further media types of the answer. `statuses`: of failures of its own."""
    done: dict[str, Any] = {"model": answer, "description": "The answer", "content": dict(content or {})}
    return {200: done, **failures(error, *ANYWHERE, *statuses)}


def failures(error: Kind, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The part of a route's `responses` that is about failures."""
    return {status: {"model": error, "description": _FAILURES[status]} for status in statuses}
