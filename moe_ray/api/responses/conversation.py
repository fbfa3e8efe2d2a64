"""The items of a conversation: from a request, into the messages of a chat template, cut where they are too many."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from moe_ray.api.responses.schemas import (
    FunctionCall,
    FunctionCallOutput,
    InputMessage,
    ReasoningItem,
    Refusal,
    ResponsesRequest,
)
from moe_ray.errors import InvalidRequest
from moe_ray.text.messages import Message

Item = dict[str, Any]
"""One item as responses and lists of items show it."""


def new_id(prefix: str) -> str:
    """An id that nobody can guess, e.g. `msg_…`."""
    return f"{prefix}_{uuid.uuid4().hex}"


def items_of(body: ResponsesRequest) -> list[Item]:
    """The items of a request's input, each with an id. Raises `InvalidRequest` naming the item."""
    if isinstance(body.input, str):
        return [_message(InputMessage(role="user", content=body.input))]
    items = []
    for i, given in enumerate(body.input):
        match given:
            case InputMessage():
                items.append(_message(given))
            case FunctionCall():
                items.append(_call(given, f"input[{i}].arguments"))
            case FunctionCallOutput():
                items.append(_call_output(given))
            case ReasoningItem():
                pass  # what another model thought
    return items


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The messages that `chat.ChatInput` takes.

    Raises `InvalidRequest` where a tool's output answers no call, or a call has no output. Calls that the model was
    cut off in are left out.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    names: dict[str, str] = {}
    open_calls: dict[str, None] = {}
    for item in items:
        if item["type"] == "message":
            _add_message(messages, item)
        elif item["type"] == "function_call_output":
            call_id = item["call_id"]
            if call_id not in names:
                raise InvalidRequest(f"No tool call found for function call output with call_id {call_id}.", "input")
            open_calls.pop(call_id, None)
            content = _text(item["output"])
            messages.append({"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": content})
        elif item["status"] != "incomplete":
            names[item["call_id"]] = item["name"]
            open_calls[item["call_id"]] = None
            _add_call(messages, item)
    if open_calls:
        raise InvalidRequest(f"No tool output found for function call {next(iter(open_calls))}.", "input")
    return messages


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where a conversation may be cut: at the messages of users, from the first one on."""
    return [i for i, message in enumerate(messages) if message["role"] == "user"]


def without_first_turns(messages: Sequence[Message], start: int) -> list[Message]:
    """The messages from `start` on, behind every system message before it."""
    return [message for i, message in enumerate(messages) if i >= start or message["role"] == "system"]


def _message(given: InputMessage) -> Item:
    kind = "output_text" if given.role == "assistant" else "input_text"
    annotations: dict[str, Any] = {"annotations": []} if given.role == "assistant" else {}
    content: list[dict[str, Any]] = []
    for part in [given.content] if isinstance(given.content, str) else given.content:
        if isinstance(part, Refusal):
            content.append({"type": "refusal", "refusal": part.refusal})
        else:
            text = part if isinstance(part, str) else part.text
            content.append({"type": kind, "text": text, **annotations})
    head = {"id": given.id or new_id("msg"), "type": "message", "role": given.role, "status": given.status}
    return {**head, "content": content}


def _call(given: FunctionCall, where: str) -> Item:
    try:
        arguments = json.loads(given.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict) and given.status != "incomplete":
        raise InvalidRequest(f"`{where}` must be the JSON text of an object", where)
    return {
        "id": given.id or new_id("fc"),
        "type": "function_call",
        "status": given.status,
        "call_id": given.call_id,
        "name": given.name,
        "arguments": given.arguments,
    }


def _call_output(given: FunctionCallOutput) -> Item:
    output: Any = given.output
    if not isinstance(output, str):
        output = [{"type": part.type, "text": part.text} for part in output]
    return {
        "id": given.id or new_id("fco"),
        "type": "function_call_output",
        "status": given.status,
        "call_id": given.call_id,
        "output": output,
    }


def _add_message(messages: list[dict[str, Any]], item: Item) -> None:
    role = "system" if item["role"] == "developer" else item["role"]
    text = _text(item["content"])
    last = messages[-1] if messages else None
    if role == "assistant" and last is not None and "tool_calls" in last:
        last["content"] += text  # said beside the calls: still the same turn
    else:
        messages.append({"role": role, "content": text})


def _add_call(messages: list[dict[str, Any]], item: Item) -> None:
    function = {"name": item["name"], "arguments": json.loads(item["arguments"] or "{}")}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})


def _text(content: str | list[dict[str, Any]]) -> str:
    """The text of a content; parts of a user are lines, parts of an answer follow each other."""
    if isinstance(content, str):
        return content
    between = "\n" if any(part["type"] == "input_text" for part in content) else ""
    return between.join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in content)
