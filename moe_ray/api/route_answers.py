"""What /openapi.json says of the answers of a route whose answers are written without FastAPI."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

from moe_ray.api.openapi import schema_of

_FAILURES: Final = {
    400: "A field of the request is wrong or not supported; the message names it",
    401: "No valid API key",
    404: "No such model",
    429: "Too many requests wait",
    503: "A part of the model is not there",
}


def answers(
    answer: type[BaseModel], error: type[BaseModel], stream: type[BaseModel] | None = None, media_type: str = ""
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route; `stream` is one event or line of `media_type` where the answer is streamed."""
    done: dict[str, Any] = {"model": answer, "description": "The answer"}
    if stream is not None:
        done["content"] = {media_type: {"schema": schema_of(stream)}}
    responses: dict[int | str, dict[str, Any]] = {200: done}
    for status, said in _FAILURES.items():
        responses[status] = {"model": error, "description": said}
    return responses
