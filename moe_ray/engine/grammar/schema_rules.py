"""Which JSON schemas a grammar can hold outputs to. What it cannot is refused by name, not ignored. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

NOT_SUPPORTED: Final = frozenset(
    {
        *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
        *("contains", "minContains", "maxContains", "$dynamicRef", "$recursiveRef"),
    }
)
ALTERNATIVES: Final = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""The first of these that a schema has is all that counts of it."""
OF_TYPE: Final[Mapping[str, frozenset[str]]] = {  # keyword's type → the keywords that restrict its values
    "object": frozenset(
        {
            *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
            *("minProperties", "maxProperties", "unevaluatedProperties"),
        }
    ),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
}
IMPLY_TYPE: Final = frozenset(
    {"properties", "additionalProperties", "unevaluatedProperties", "items", "prefixItems", "unevaluatedItems"}
)
"""A schema with one of them describes an object or an array, also without its type."""
RESTRICTING: Final = frozenset[str]().union(*OF_TYPE.values())
MOST_MULTIPLE: Final = 1024
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def unsupported(schema: Any, path: str = "#") -> str | None:
    """What in a JSON schema outputs cannot be held to, with its place; None where they can be held to all of it."""
    if not isinstance(schema, Mapping):
        return None
    found = next(iter(_of(schema)), None)
    if found is not None:
        return f"{found}, at {path}"
    return next((told for place, inner in _inner(schema) if (told := unsupported(inner, f"{path}/{place}"))), None)


def _of(schema: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with one schema itself."""
    for keyword in sorted(NOT_SUPPORTED & schema.keys()):
        yield f"`{keyword}` is not supported"
    if schema.get("uniqueItems"):
        yield "`uniqueItems` is not supported"
    ref = schema.get("$ref")
    if ref is not None and not (isinstance(ref, str) and (ref == "#" or ref.startswith("#/"))):
        yield f"`$ref` must point into the schema itself (#/…), got {ref!r}"
    alternative = next((keyword for keyword in ALTERNATIVES if keyword in schema), None)
    if alternative is not None:
        yield from _beside(schema, alternative)
    elif "type" not in schema and not IMPLY_TYPE & schema.keys():
        for keyword in sorted(RESTRICTING & schema.keys()):
            yield f"`{keyword}` needs a `type` beside it"
    else:
        yield from _of_values(schema)


def _beside(schema: Mapping[str, Any], alternative: str) -> Iterator[str]:
    """What stands beside the one keyword that counts."""
    for keyword in sorted((RESTRICTING | set(ALTERNATIVES)) & schema.keys() - {alternative}):
        yield f"`{keyword}` beside `{alternative}` is not supported"
    wanted = schema.get("type")
    values: Any = [schema["const"]] if alternative == "const" else schema[alternative]
    if alternative in ("anyOf", "oneOf", "allOf"):
        if alternative == "allOf" and isinstance(values, list) and len(values) > 1:
            yield "`allOf` of more than one schema is not supported"
        if wanted is not None and not all(isinstance(each, dict) and each.get("type") == wanted for each in values):
            yield f"`type` beside `{alternative}` is not supported: write it into each of them"
    elif wanted is not None and alternative == "$ref":
        yield "`type` beside `$ref` is not supported"
    elif wanted is not None and isinstance(values, list):
        for value in values:
            if not any(_is(value, name) for name in (wanted if isinstance(wanted, list) else [wanted])):
                yield f"`{alternative}` has {value!r}, which is of another `type`"


def _of_values(schema: Mapping[str, Any]) -> Iterator[str]:
    """What cannot be held to of the keywords of a type."""
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    multiple = schema.get("multipleOf")
    if multiple is not None:
        if "number" in types:
            yield "`multipleOf` is supported for integers only"
        elif not isinstance(multiple, int) or multiple > MOST_MULTIPLE:
            yield f"`multipleOf` must be a whole number of at most {MOST_MULTIPLE}"
    lengths = sorted({"minLength", "maxLength"} & schema.keys())
    for keyword in ("pattern", "format"):
        if lengths and keyword in schema:
            yield f"`{lengths[0]}` beside `{keyword}` is not supported"
    if "pattern" in schema and "format" in schema:
        yield "`format` beside `pattern` is not supported"
    required, properties = schema.get("required"), schema.get("properties")
    for name in required if isinstance(required, list) else ():
        if not isinstance(properties, Mapping) or name not in properties:
            yield f"`required` names {name!r}, which is not among the `properties`"


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema, with their places."""
    for keyword in ("properties", "patternProperties", "$defs", "definitions"):
        group = schema.get(keyword)
        if isinstance(group, Mapping):
            for name, inner in group.items():
                yield f"{keyword}/{name}", inner
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        listed = schema.get(keyword)
        if isinstance(listed, list):
            for index, inner in enumerate(listed):
                yield f"{keyword}/{index}", inner
    for keyword in ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems"):
        if isinstance(schema.get(keyword), Mapping):
            yield keyword, schema[keyword]
    if isinstance(schema.get("propertyNames"), Mapping):
        yield "propertyNames", {"type": "string", **schema["propertyNames"]}  # names are strings


def _is(value: Any, name: Any) -> bool:
    """A value is of a type by its name."""
    if isinstance(value, bool) and name != "boolean":
        return False
    return isinstance(name, str) and isinstance(value, _TYPES.get(name, (object,)))
