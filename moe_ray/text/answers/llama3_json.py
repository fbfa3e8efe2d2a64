"""Calls as Llama 3.1 and its followers write them: the answer is JSON objects with `parameters`, `;` between them."""

from __future__ import annotations

from typing import Final

from moe_ray.text.answers.structure import (
    CallShape,
    Structure,
    arguments_of,
    call_objects,
    either,
    one_or_more,
    sequence,
    text,
    text_with,
)
from moe_ray.text.answers.syntax import CallSyntax

_BEGIN: Final = '{"name": "'
_PYTHON: Final = "<|python_tag|>"
SYNTAX: Final = CallSyntax(((_PYTHON, ""), ("{", "")), where="start", separators=";,")
EXACT: Final = CallSyntax(((_BEGIN, ""),), separators=";")
MARKERS: Final = (_PYTHON,)


def written(name: str, arguments: str) -> str:
    """A call as text.

    >>> written("now", "{}")
    '{"name": "now", "parameters": {}}'
    """
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def calls(shape: CallShape) -> Structure:
    """Nothing but calls."""
    return one_or_more(call_objects(shape, "parameters"), "; ", shape.parallel)


def text_with_calls(shape: CallShape) -> Structure:
    """Text in which what begins as `EXACT` says is a valid call."""
    return text_with_objects(shape, "parameters")


def text_with_objects(shape: CallShape, key: str) -> Structure:
    """Text in which an object that begins with a name is a call whose arguments are under `key`."""
    inside = [sequence(text(f'{name}", "{key}": '), arguments_of(shape, name)) for name in shape.arguments]
    return text_with(_BEGIN, either(inside), "}", {}, last=not shape.parallel)
