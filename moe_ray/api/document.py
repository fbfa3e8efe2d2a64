"""The document at /openapi.json: what FastAPI makes of the routes, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import fastapi
from fastapi.openapi.utils import get_openapi

from moe_ray.api.examples import examples_of

DESCRIPTION: Final = """\
A mixture-of-experts language model, by the APIs of OpenAI, Anthropic, ollama and text-generation-inference.

Each API has its own form of errors. A field that is not supported is refused by name."""
KEYS: Final[dict[str, dict[str, str]]] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "One of the server's API keys"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same"},
}
OPEN: Final[list[dict[str, list[str]]]] = []
"""`security` of what is answered without a key."""
_UNUSED: Final = ("HTTPValidationError", "ValidationError")
"""FastAPI's own errors, of routes whose parameters it checks. Any text is a valid one here."""


def describe(app: fastapi.FastAPI, model: str, open_paths: frozenset[str], *, has_keys: bool) -> None:
    """Set what the application that serves `model` says of itself.

    With keys, they are asked for on all but `open_paths`.
    """
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(_document(app, model, open_paths, has_keys))
        return made

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: fastapi.FastAPI, model: str, open_paths: frozenset[str], has_keys: bool) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    components = document.setdefault("components", {})
    for name in _UNUSED:
        components.get("schemas", {}).pop(name, None)
    if has_keys:
        components["securitySchemes"] = KEYS
        document["security"] = [{name: []} for name in KEYS]
    for path, operation in _operations(document):
        summary, _, more = operation.pop("description", "").partition("\n\n")
        operation["summary"] = summary
        if more:
            operation["description"] = more
        if any(f"/{name}" in str(operation["responses"].get("422")) for name in _UNUSED):
            del operation["responses"]["422"]
        if has_keys and path in open_paths:
            operation["security"] = OPEN
        for body in operation.get("requestBody", {}).get("content", {}).values():
            body["examples"] = {shown: {"value": example} for shown, example in examples_of(path, model).items()}
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation
