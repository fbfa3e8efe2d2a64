"""Calls as Mistral's models write them: a token, then a JSON array; from version 11 on, a name and its arguments.

[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "D681PevKs"}]
[TOOL_CALLS]now[ARGS]{}
"""

from __future__ import annotations

from typing import Final

from moe_ray.text.answers.structure import (
    CallShape,
    Structure,
    arguments_of,
    call_objects,
    either,
    marker,
    one_or_more,
    optional,
    pattern,
    sequence,
    text,
    text_with,
)
from moe_ray.text.answers.syntax import CallSyntax

_BEGIN: Final = "[TOOL_CALLS]"
_CALL_ID: Final = "[CALL_ID]"
_ARGUMENTS: Final = "[ARGS]"
SYNTAX: Final = CallSyntax(((_BEGIN, ""),), array=True, named=True, short_ids=True)
MARKERS: Final = (_BEGIN, _CALL_ID, _ARGUMENTS)


def written(name: str, arguments: str) -> str:
    """A call as text.

    >>> written("now", "{}")
    '[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    """
    return f'{_BEGIN}[{{"name": "{name}", "arguments": {arguments}}}]'


def calls(shape: CallShape) -> Structure:
    """Nothing but calls."""
    begin = marker(_BEGIN, shape.tokens)
    if _ARGUMENTS in shape.tokens:
        return one_or_more(sequence(begin, _named(shape)), "", shape.parallel)
    return sequence(begin, _array(shape), text("]"))


def text_with_calls(shape: CallShape) -> Structure:
    """Text in which each call is a valid one."""
    if _ARGUMENTS in shape.tokens:
        return text_with(_BEGIN, _named(shape), "", shape.tokens, last=not shape.parallel)
    return text_with(_BEGIN, _array(shape), "]", shape.tokens, last=True)


def _array(shape: CallShape) -> Structure:
    """All but the closing bracket; sentencepiece's vocabularies put a space before a text behind a special token."""
    objects = call_objects(shape, "arguments", optional(pattern(', "id": "[a-zA-Z0-9]{9}"')))
    return sequence(pattern(" ?"), text("["), one_or_more(objects, ", ", shape.parallel))


def _named(shape: CallShape) -> Structure:
    call_id: list[Structure] = []
    if _CALL_ID in shape.tokens:
        call_id = [optional(sequence(marker(_CALL_ID, shape.tokens), pattern("[a-zA-Z0-9]{9}")))]
    arguments = marker(_ARGUMENTS, shape.tokens)
    return either([sequence(text(name), *call_id, arguments, arguments_of(shape, name)) for name in shape.arguments])
