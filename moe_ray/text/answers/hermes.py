"""Calls as Hermes and Qwen write them: `<tool_call>` and `</tool_call>` around a JSON object, any number of times."""

from __future__ import annotations

from typing import Final

from moe_ray.text.answers.structure import (
    CallShape,
    Structure,
    call_objects,
    marker,
    one_or_more,
    sequence,
    text,
    text_with,
)
from moe_ray.text.answers.syntax import CallSyntax

_BEGIN: Final = "<tool_call>"
_END: Final = "</tool_call>"
SYNTAX: Final = CallSyntax(((_BEGIN, _END),), array=True)
MARKERS: Final = (_BEGIN, _END)


def written(name: str, arguments: str) -> str:
    """A call as text.

    >>> written("now", "{}")
    '<tool_call>\\n{"name": "now", "arguments": {}}\\n</tool_call>'
    """
    return f'{_BEGIN}\n{{"name": "{name}", "arguments": {arguments}}}\n{_END}'


def calls(shape: CallShape) -> Structure:
    """Nothing but calls."""
    call = sequence(marker(_BEGIN, shape.tokens), _inside(shape), marker(_END, shape.tokens))
    return one_or_more(call, "\n", shape.parallel)


def text_with_calls(shape: CallShape) -> Structure:
    """Text in which each call is a valid one."""
    return text_with(_BEGIN, _inside(shape), _END, shape.tokens, last=not shape.parallel)


def _inside(shape: CallShape) -> Structure:
    return sequence(text("\n"), call_objects(shape), text("\n"))
