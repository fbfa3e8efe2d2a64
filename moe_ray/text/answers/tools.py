"""The tools that a model may call, and whether it may, must or must not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from moe_ray.errors import InvalidRequest

FUNCTION_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
FUNCTION_NAME_RULE: Final = "must be 1 to 64 of a-z, A-Z, 0-9, _ and -"
MAX_TOOLS: Final = 128
MAX_TOOL_CHARACTERS: Final = 2**16
"""Of one tool's description and schema."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    """JSON schema of its arguments, of type object."""
    strict: bool = False
    """Arguments must match the schema even where the model may choose whether to call."""

    def described(self) -> dict[str, Any]:
        """As chat templates take a tool.

        >>> Tool("now").described()["function"]["name"]
        'now'
        """
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must or must not call tools."""

    mode: str = "auto"
    """"none", "auto", "required"; or "named": `name` must be called."""
    name: str = ""
    parallel: bool = True
    """More than one call in an answer; of a named tool there is one."""

    @property
    def several(self) -> bool:
        """Whether an answer may hold more than one call."""
        return self.parallel and self.mode != "named"


AUTO: Final = ToolChoice()


def check_tools(tools: Sequence[Tool], choice: ToolChoice, path: str = "tools[{}].function") -> None:
    """Check the tools of a request, and that the choice is among them. Raises `InvalidRequest`.

    `path` is what the API calls the tool of a number.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"`tools` has {len(tools)} tools; at most {MAX_TOOLS} are allowed", "tools")
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        where = path.format(i)
        if not FUNCTION_NAME.fullmatch(tool.name):
            raise InvalidRequest(f"`{where}.name` {FUNCTION_NAME_RULE}, got {tool.name[:80]!r}", f"{where}.name")
        if tool.name in seen:
            raise InvalidRequest(f"`{where}.name`: there are two tools named {tool.name!r}", f"{where}.name")
        seen.add(tool.name)
        _check_schema(tool.parameters, f"{where}.parameters")
        if len(json.dumps(tool.described())) > MAX_TOOL_CHARACTERS:
            raise InvalidRequest(f"`{where}` has more than {MAX_TOOL_CHARACTERS} characters", where)
    if choice.mode in ("required", "named") and not tools:
        raise InvalidRequest("`tool_choice` is only allowed when `tools` are given", "tool_choice")
    if choice.mode == "named" and choice.name not in seen:
        raise InvalidRequest(f"`tool_choice` names {choice.name!r}, which is not among `tools`", "tool_choice")


def _check_schema(schema: Mapping[str, Any], where: str) -> None:
    """Check what every tool's schema must be; what else is in it is the engine's to judge."""
    kind = schema.get("type", "object")
    if kind != "object":
        raise InvalidRequest(f"`{where}` must be a JSON schema of type object, got type {kind!r}", where)
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise InvalidRequest(f"`{where}.properties` must be an object", f"{where}.properties")
    for name, each in properties.items():
        if not isinstance(each, Mapping | bool):
            raise InvalidRequest(f"`{where}.properties.{name}` must be a schema", f"{where}.properties.{name}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InvalidRequest(f"`{where}.required` must be a list of names", f"{where}.required")
