"""What an answer must look like, in xgrammar's structural tags: plain data that the engine compiles.

The elements are xgrammar's (`xgrammar.structural_tag`). A marker that is a special token is matched as that token:
spelled out in other tokens it means nothing to the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar

Structure = dict[str, Any]
ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object", "additionalProperties": True}
_MOST_SPACES: Final = 2
"""In a row, between the parts of a call's arguments: an answer cannot go on in spaces for ever."""


@dataclass(frozen=True, slots=True)
class CallShape:
    """Which calls an answer may hold."""

    arguments: Mapping[str, Mapping[str, Any]]
    """Name of a tool → JSON schema of its arguments."""
    parallel: bool
    """More than one."""
    tokens: Mapping[str, int]
    """The vocabulary's special tokens."""


def text(value: str) -> Structure:
    """The text itself."""
    return {"type": "const_string", "value": value}


def pattern(value: str) -> Structure:
    """What a regular expression matches."""
    return {"type": "regex", "pattern": value}


def json_value(schema: Mapping[str, Any], most_spaces: int | None = None) -> Structure:
    """JSON that a schema describes; with `most_spaces` whitespace in a row at most."""
    value: Structure = {"type": "json_schema", "json_schema": dict(schema)}
    return value if most_spaces is None else {**value, "max_whitespace_cnt": most_spaces}


def sequence(*elements: Structure) -> Structure:
    """One after the other."""
    return {"type": "sequence", "elements": list(elements)}


def either(elements: Sequence[Structure]) -> Structure:
    """One of several."""
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": list(elements)}


def optional(element: Structure) -> Structure:
    """It, or nothing."""
    return {"type": "optional", "content": element}


def marker(name: str, tokens: Mapping[str, int]) -> Structure:
    """A marker: its token where it is a special one, else its text."""
    return {"type": "token", "token": tokens[name]} if name in tokens else text(name)


def arguments_of(shape: CallShape, name: str) -> Structure:
    """JSON text of a tool's arguments."""
    return json_value(shape.arguments[name], _MOST_SPACES)


def call_objects(shape: CallShape, key: str = "arguments", *more: Structure) -> Structure:
    """`{"name": "…", "arguments": {…}}` of one of the tools; `more` stands before the closing brace."""
    return either(
        [
            sequence(text(f'{{"name": {json.dumps(name)}, "{key}": '), arguments_of(shape, name), *more, text("}"))
            for name in shape.arguments
        ]
    )


def one_or_more(call: Structure, separator: str, parallel: bool) -> Structure:
    """Calls in a row, or just one where not `parallel`."""
    if not parallel:
        return call
    further = sequence(text(separator), call) if separator else call
    return sequence(call, {"type": "star", "content": further})


def text_with(begin: str, content: Structure, end: str, tokens: Mapping[str, int], last: bool) -> Structure:
    """Any text, in which `begin` is only followed by `content` and `end`; with `last`, nothing comes after that."""
    ending = marker(end, tokens) if end in tokens else end
    if begin in tokens:
        token = tokens[begin]
        tag = {"type": "tag", "begin": marker(begin, tokens), "content": content, "end": ending}
        return {
            "type": "token_triggered_tags",
            "trigger_tokens": [token],
            "tags": [tag],
            "stop_after_first": last,
        }
    tag = {"type": "tag", "begin": begin, "content": content, "end": ending}
    return {"type": "triggered_tags", "triggers": [begin], "tags": [tag], "stop_after_first": last}


def grammar_of(structure: Structure) -> Grammar:
    """The grammar that the engine masks with."""
    return Grammar("structural_tag", json.dumps({"type": "structural_tag", "format": structure}, ensure_ascii=False))


def structure_of(grammar: Grammar) -> Structure:
    """A grammar as a part of a structure. Raises `InvalidRequest` for a structural tag that is of no such form."""
    match grammar.kind:
        case "json_object":
            return json_value(ANY_OBJECT)
        case "json_schema":
            schema: Any = json.loads(grammar.source)
            return {"type": "json_schema", "json_schema": schema}
        case "regex":
            return pattern(grammar.source)
        case "ebnf":
            return {"type": "grammar", "grammar": grammar.source}
    tag: Any = json.loads(grammar.source)
    if not isinstance(tag, dict) or not isinstance(tag.get("format"), dict):
        raise InvalidRequest("a structural tag beside tools must have a `format`", "response_format")
    inner: Structure = tag["format"]
    return inner
