"""What /openapi.json says of sampling parameters: bodies take them without a field for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, Final

from pydantic import TypeAdapter

from moe_ray.core import SamplingParams
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import range_of, rule_of

NAMES: Final = frozenset(each.name for each in fields(SamplingParams))
_ALONE: Final = ("stop", "bad_words")
"""Lists of strings; one string stands for a list of it."""


def with_sampling(
    names: Collection[str], further: Mapping[str, dict[str, Any]] | None = None
) -> Callable[[dict[str, Any]], None]:
    """`json_schema_extra` of a model: adds those sampling parameters that are no fields of the model itself.

    `further`: field → schema of what else a body may have, where every other field is refused.
    """

    def extend(schema: dict[str, Any]) -> None:
        for name in sorted(names):
            schema["properties"].setdefault(name, _schemas()[name])
        if further is not None:
            schema["properties"] |= further
            schema["additionalProperties"] = False

    return extend


def sampling_given(extra: Mapping[str, Any] | None, names: Collection[str]) -> dict[str, Any]:
    """The sampling parameters among the further fields of a body, unchecked but for an empty choice of tokens."""
    given = {name: value for name, value in (extra or {}).items() if name in names}
    if given.get("allowed_token_ids") == []:
        raise InvalidRequest("`allowed_token_ids` must hold at least one token id", "allowed_token_ids")
    return given


@functools.cache
def _schemas() -> dict[str, dict[str, Any]]:
    found = TypeAdapter(SamplingParams).json_schema()
    properties: dict[str, dict[str, Any]] = found["properties"]
    return {name: _described(name, schema) for name, schema in properties.items() if "$ref" not in str(schema)}


def _described(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    # Without the default: of what is left out, the checkpoint's generation_config.json decides.
    kinds = schema.get("anyOf") or [
        {key: value for key, value in schema.items() if key not in ("default", "description", "title")},
        {"type": "null"},
    ]
    if (bounds := range_of(name)) is not None:
        low, high = bounds
        kinds[0] |= {"exclusiveMinimum": 0} if low == math.ulp(0.0) else {"minimum": low}
        kinds[0]["maximum"] = high
    if name == "logit_bias":
        kinds[0]["propertyNames"] = {"pattern": "^[0-9]+$"}
    if name in _ALONE:
        kinds.insert(0, {"type": "string"})
    rule = rule_of(name)
    return {"anyOf": kinds, "description": f"{schema.get('description', '')} {rule[0].upper()}{rule[1:]}.".strip()}
