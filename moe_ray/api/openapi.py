"""What /openapi.json says of routes that read their bodies themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

_DEFS: Final = "#/$defs/"


def json_body(*models: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is JSON in the form of one of `models`."""
    schemas = [schema_of(model) for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def events_of(model: type[BaseModel]) -> dict[str, Any]:
    """`content` of a response that may be server-sent events, each with data in the form of `model`."""
    return {"text/event-stream": {"schema": schema_of(model)}}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model that does not contain itself, with no reference in it."""
    schema = model.model_json_schema()
    found: dict[str, Any] = _inlined(schema, schema.pop("$defs", {}))
    return found


def _inlined(value: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_inlined(each, definitions) for each in value]
    if not isinstance(value, dict):
        return value
    name = value.get("$ref")
    if isinstance(name, str) and name.startswith(_DEFS):
        return _inlined(definitions[name.removeprefix(_DEFS)], definitions)
    return {key: _inlined(each, definitions) for key, each in value.items()}
