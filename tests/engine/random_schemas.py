"""Random JSON schemas whose every output ends soon: all strings, arrays and depths are bounded."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = ["^[a-z]{1,4}$", "^(yes|no)$", "^[0-9]{2}:[0-9]{2}$", "^#[0-9a-f]{3}$", "^é{1,2}$"]
FORMATS = ["date", "time", "ipv4", "uuid"]
NAMES = ["a", "name", "größe", "x y", 'with "quote"', "back\\slash", "中文"]


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of a kind chosen at random; objects and arrays end at the third level."""
    makers = [_string, _number, _choice, _simple]
    if depth < 3:
        makers += [_object, _object, _array, _union, _reference if depth == 0 else _object]
    return rng.choice(makers)(rng, depth)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    match rng.randrange(3):
        case 0:
            least = rng.randrange(3)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(1, 6)}
        case 1:
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        case _:
            return {"type": "string", "format": rng.choice(FORMATS)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(-200, 200)
    bounds = rng.choice(
        [
            {"minimum": low, "maximum": low + rng.randrange(50)},
            {"exclusiveMinimum": low, "exclusiveMaximum": low + 2 + rng.randrange(50)},
        ]
    )
    return {"type": "integer", **bounds}


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = ["red", "grün", 3, None, True, 'a"b', {"k": [1, 2]}, ["x"]]
    return rng.choice([{"enum": rng.sample(values, rng.randrange(1, 5))}, {"const": rng.choice(values)}])


def _simple(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randrange(1, 5))
    properties = {name: random_schema(rng, depth + 1) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    schema: dict[str, Any] = {"type": "object", "properties": properties, "title": "An object"}
    if required or rng.random() < 0.5:
        schema["required"] = required
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        items = [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    least = rng.randrange(3)
    return {
        "type": "array",
        "items": random_schema(rng, depth + 1),
        "minItems": least,
        "maxItems": least + rng.randrange(1, 3),
    }


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    tree = {
        "type": "object",
        "properties": {"value": random_schema(rng, 2), "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]}},
        "required": ["value", "next"],
    }
    return {"$defs": {"tree": tree, "leaf": random_schema(rng, 2)}, "$ref": "#/$defs/tree"}
