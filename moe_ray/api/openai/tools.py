"""Tools, the choice among them, and their calls in messages, as the chat completions API writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import ConfigDict

from moe_ray.api.documented import Documented
from moe_ray.errors import InvalidRequest
from moe_ray.text.answers.tools import FUNCTION_NAME, FUNCTION_NAME_RULE, Tool, ToolChoice

LEGACY_ID: Final = "call_of_message_{}"
"""Of a call in the form of before tools, which has no id."""


class FunctionBody(Documented):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """The tool that it is."""
        schema = {"type": "object", "properties": {}, **(self.parameters or {})}
        return Tool(self.name, self.description or "", schema, bool(self.strict))


class ToolBody(Documented):
    """A tool: a function."""

    type: Literal["function"]
    function: FunctionBody


class FunctionName(Documented):
    """A function by its name."""

    name: str


class NamedChoice(Documented):
    """The function that must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


Choice = Literal["none", "auto", "required"] | NamedChoice
LegacyChoice = Literal["none", "auto"] | FunctionName


def tools_of(tools: Sequence[ToolBody], functions: Sequence[FunctionBody]) -> tuple[Tool, ...]:
    """The tools of a request, in either form. Raises `InvalidRequest` for both at once."""
    if tools and functions:
        raise InvalidRequest("`functions` is the old form of `tools`: give one of them", "functions")
    return tuple(each.tool() for each in functions) or tuple(each.function.tool() for each in tools)


def choice_of(choice: Choice | None, legacy: LegacyChoice | None, parallel: bool, is_legacy: bool) -> ToolChoice:
    """The choice of a request, in either form; the old one has one call at most."""
    if choice is not None and legacy is not None:
        raise InvalidRequest("`function_call` is the old form of `tool_choice`: give one of them", "function_call")
    parallel = parallel and not is_legacy
    if isinstance(choice, NamedChoice):
        return ToolChoice("named", choice.function.name, parallel)
    if isinstance(legacy, FunctionName):
        return ToolChoice("named", legacy.name, parallel)
    return ToolChoice(choice or legacy or "auto", parallel=parallel)


def conversation(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as chat templates take them: calls with their arguments as objects, no old names of roles.

    Raises `InvalidRequest` naming the field.
    """
    turns: list[dict[str, Any]] = []
    called = ""
    for i, message in enumerate(messages):
        turn = {key: value for key, value in message.items() if value is not None or key == "content"}
        if turn["role"] == "developer":  # OpenAI's newer name for system, unknown to templates
            turn["role"] = "system"
        calls = turn.pop("tool_calls", None)
        legacy = turn.pop("function_call", None)
        if legacy is not None:
            if calls:
                raise InvalidRequest(f"`messages[{i}]` has both `function_call` and `tool_calls`", f"messages[{i}]")
            called = LEGACY_ID.format(i)
            function = _function(legacy, f"messages[{i}].function_call")
            turn["tool_calls"] = [{"id": called, "type": "function", "function": function}]
        elif calls:
            turn["tool_calls"] = _calls(calls, f"messages[{i}].tool_calls")
        elif calls is not None and not isinstance(calls, list):
            raise InvalidRequest(f"`messages[{i}].tool_calls` must be a list", f"messages[{i}].tool_calls")
        if turn["role"] == "function":
            turn |= {"role": "tool", "tool_call_id": called or LEGACY_ID.format(i)}
        turns.append(turn)
    return turns


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"`{where}` must be a list", where)
    read: list[dict[str, Any]] = []
    for k, call in enumerate(calls):
        at = f"{where}[{k}]"
        if not isinstance(call, dict):
            raise InvalidRequest(f"`{at}` must be an object", at)
        if call.get("type", "function") != "function":
            raise InvalidRequest(f"`{at}.type` must be 'function', got {call['type']!r}", f"{at}.type")
        function = _function(call.get("function"), f"{at}.function")
        read.append({"id": call.get("id"), "type": "function", "function": function})
    return read


def _function(function: Any, where: str) -> dict[str, Any]:
    """A call's function, its arguments as an object."""
    if not isinstance(function, dict):
        raise InvalidRequest(f"`{where}` must be an object with `name` and `arguments`", where)
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise InvalidRequest(f"`{where}.name` {FUNCTION_NAME_RULE}", f"{where}.name")
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}")
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"`{where}.arguments` must be the JSON text of an object", f"{where}.arguments")
    return {"name": name, "arguments": arguments}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
