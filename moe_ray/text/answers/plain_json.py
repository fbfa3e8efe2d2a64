"""Calls as JSON objects, one a line: what moe_ray asks of models whose chat template knows no tools."""

from __future__ import annotations

from typing import Final

from moe_ray.text.answers.llama3_json import text_with_objects
from moe_ray.text.answers.structure import CallShape, Structure, call_objects, one_or_more
from moe_ray.text.answers.syntax import CallSyntax

SYNTAX: Final = CallSyntax(
    (("```json", "```"), ("```", "```"), ("{", ""), ("[", "")), where="line", array=True, separators=",;"
)
EXACT: Final = CallSyntax((('{"name": "', ""),), separators="")


def written(name: str, arguments: str) -> str:
    """A call as text.

    >>> written("now", "{}")
    '{"name": "now", "arguments": {}}'
    """
    return f'{{"name": "{name}", "arguments": {arguments}}}'


def calls(shape: CallShape) -> Structure:
    """Nothing but calls."""
    return one_or_more(call_objects(shape), "\n", shape.parallel)


def text_with_calls(shape: CallShape) -> Structure:
    """Text in which what begins as `EXACT` says is a valid call."""
    return text_with_objects(shape, "arguments")
