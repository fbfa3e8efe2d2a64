"""TGI's `grammar` parameter as a `Grammar`."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json

from moe_ray.api.tgi.schemas import TgiGrammar
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar


def grammar_of(given: TgiGrammar) -> Grammar:
    """What the engine's grammar must be. Raises `InvalidRequest` with TGI's messages."""
    if given.type == "regex":
        if not isinstance(given.value, str):
            raise _invalid("the value of a regex must be a string")
        return Grammar("regex", given.value)
    if given.type == "json_schema":
        schema = given.value.get("schema") if isinstance(given.value, dict) else None
        if schema is None:
            raise _invalid("the value of a json_schema must be an object with a `schema`")
    else:
        schema = _parsed(given.value)
    if not isinstance(schema, dict):
        raise _invalid(f"a JSON schema must be an object, got {type(schema).__name__}")
    if "properties" not in schema:
        raise _invalid("Grammar must have a 'properties' field")
    # A schema with properties says nothing of what is no object; it means one.
    return Grammar("json_schema", json.dumps({"type": "object", **schema}, ensure_ascii=False))


def _parsed(value: Any) -> Any:
    """A schema that may have come as its text."""
    if not isinstance(value, str):
        return value
    try:
        return from_json(value)
    except ValueError as error:
        raise _invalid(str(error)) from None


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest(f"grammar is not valid: {why}", "grammar")
