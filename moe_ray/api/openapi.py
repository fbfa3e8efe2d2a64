"""What /openapi.json says of routes that read their bodies and write their answers themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

_DEFS: Final = "#/$defs/"


def json_body(*models: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is JSON in the form of one of `models`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _any_of(models)}}}}


def events_of(*models: type[BaseModel], last: str = "") -> dict[str, Any]:
    """`content` of a response that may be server-sent events, each with data in the form of one of `models`.

    `last`: the data of the event behind them, where there is one. In the form of OpenAPI 3.2, as FastAPI writes it.
    """
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": _any_of(models),
    }
    if last:
        data = {"anyOf": [{"type": "string", "const": last}, data]}
    event = {
        "type": "object",
        "properties": {"data": data, "event": {"type": "string"}},
        "required": ["data"],
    }
    return {"text/event-stream": {"itemSchema": event}}


def lines_of(media_type: str, *models: type[BaseModel]) -> dict[str, Any]:
    """`content` of a response that may be lines of JSON, each in the form of one of `models`."""
    return {media_type: {"itemSchema": _any_of(models)}}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model that does not contain itself, with no reference in it."""
    schema = model.model_json_schema()
    found: dict[str, Any] = _inlined(schema, schema.pop("$defs", {}))
    return found


def _any_of(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    schemas = [schema_of(model) for model in models]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _inlined(value: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_inlined(each, definitions) for each in value]
    if not isinstance(value, dict):
        return value
    name = value.get("$ref")
    if isinstance(name, str) and name.startswith(_DEFS):
        beside = {key: each for key, each in value.items() if key != "$ref"}
        return {**_inlined(definitions[name.removeprefix(_DEFS)], definitions), **beside}
    return {key: _inlined(each, definitions) for key, each in value.items() if key != "discriminator"}
