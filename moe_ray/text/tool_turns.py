"""Calls of tools and their results within a conversation: what is wrong with them, and their form for each template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from moe_ray.errors import InvalidRequest
from moe_ray.text.answers.tools import FUNCTION_NAME, FUNCTION_NAME_RULE, Tool
from moe_ray.text.messages import Message

_SHORT_ID: Final = re.compile(r"[a-zA-Z0-9]{9}")

_INTRODUCTION: Final = "You may call functions. These are the functions, one a line:"
_HOW: Final = (
    "To call a function, answer with exactly this form and nothing else, once for each call:\n"
    "{example}\n"
    "Its result comes in the next message. If no function is needed, answer in plain text."
)


def check_tool_turns(messages: Sequence[Message]) -> None:
    """Check that calls and results belong together. Raises `InvalidRequest` naming the field.

    Each result answers a call of the assistant's turn before it, each call is answered once.
    """
    open_ids: set[str] = set()
    known: set[str] = set()
    for i, message in enumerate(messages):
        if message.get("role") == "tool":
            _check_result(message, open_ids, known, f"messages[{i}].tool_call_id")
            open_ids.discard(message["tool_call_id"])
            continue
        _check_answered(open_ids, f"messages[{i}]")
        calls = message.get("tool_calls") or ()
        if calls and message.get("role") != "assistant":
            raise InvalidRequest(f"`messages[{i}].tool_calls` is for the assistant alone", f"messages[{i}].tool_calls")
        known = {_checked_id(call, f"messages[{i}].tool_calls[{k}]") for k, call in enumerate(calls)}
        if len(known) < len(calls):
            raise InvalidRequest(f"`messages[{i}].tool_calls` has an id twice", f"messages[{i}].tool_calls")
        open_ids = set(known)
    _check_answered(open_ids, "messages")


def with_short_ids(chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with ids of nine letters and digits, as Mistral's templates demand: others get a fixed one."""
    short: list[dict[str, Any]] = []
    for message in chat:
        own = dict(message)
        if own.get("tool_call_id"):
            own["tool_call_id"] = _short_id(own["tool_call_id"])
        if own.get("tool_calls"):
            own["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in own["tool_calls"]]
        short.append(own)
    return short


def in_order_of_calls(chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with results in the order of the calls that they answer."""
    ordered: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    for message in chat:
        if message["role"] != "tool":
            places = {call["id"]: i for i, call in enumerate(message.get("tool_calls") or ())}
            ordered.append(message)
            continue
        at = len(ordered)
        place = _place(message, places)
        while at and ordered[at - 1]["role"] == "tool" and _place(ordered[at - 1], places) > place:
            at -= 1
        ordered.insert(at, message)
    return ordered


def _place(result: dict[str, Any], places: dict[str, int]) -> int:
    return places.get(result.get("tool_call_id", ""), len(places))


def as_plain_turns(
    chat: Sequence[dict[str, Any]], tools: Sequence[Tool], written: Callable[[str, str], str]
) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: they are told in the system text, results by the user.

    `written` is how the model is to write a call (`CallFormat.written`).
    """
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in in_order_of_calls(chat):
        if message["role"] == "tool":
            name = names.get(message.get("tool_call_id", ""), "the function")
            _add(turns, "user", f"Result of {name}: {message['content']}", told=True)
        elif calls := message.get("tool_calls"):
            names = {call["id"]: call["function"]["name"] for call in calls}
            texts = [message["content"]] if message["content"] else []
            texts += [written(call["function"]["name"], _dumped(call["function"]["arguments"])) for call in calls]
            turns.append({"role": "assistant", "content": "\n".join(texts)})
        elif message["role"] == "user" and turns and turns[-1].pop("told", False):
            _add(turns, "user", message["content"], told=True)
        else:
            turns.append({key: value for key, value in message.items() if key != "tool_calls"})
    for turn in turns:
        turn.pop("told", None)
    return _with_system_text(turns, _tools_text(tools, written)) if tools else turns


def _add(turns: list[dict[str, Any]], role: str, content: str, told: bool) -> None:
    """Add to the last turn, if it tells results, too: roles alternate in many templates."""
    if turns and turns[-1]["role"] == role:
        turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n{content}", "told": told}
    else:
        turns.append({"role": role, "content": content, "told": told})


def _tools_text(tools: Sequence[Tool], written: Callable[[str, str], str]) -> str:
    told = [_dumped(tool.described()["function"]) for tool in tools]
    how = _HOW.replace("{example}", written("function_name", '{"argument_name": "value"}'))
    return "\n".join([_INTRODUCTION, *told, "", how])


def _with_system_text(turns: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if turns and turns[0]["role"] == "system":
        content = "\n\n".join(filter(None, [turns[0]["content"], text]))
        return [{**turns[0], "content": content}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short_id(call_id: str) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _checked_id(call: Any, where: str) -> str:
    """The id of a call that is well-formed."""
    call_id, function = call.get("id"), call["function"]
    if not isinstance(call_id, str) or not call_id:
        raise InvalidRequest(f"`{where}.id` must be a string, not empty", f"{where}.id")
    if not isinstance(function["name"], str) or not FUNCTION_NAME.fullmatch(function["name"]):
        raise InvalidRequest(f"`{where}.function.name` {FUNCTION_NAME_RULE}", f"{where}.function.name")
    if not isinstance(function["arguments"], dict):
        raise InvalidRequest(f"`{where}.function.arguments` must be a JSON object", f"{where}.function.arguments")
    return call_id


def _check_result(message: Message, open_ids: set[str], known: set[str], where: str) -> None:
    call_id = message.get("tool_call_id")
    if not isinstance(call_id, str) or not call_id:
        raise InvalidRequest(f"`{where}` is required: the id of the call that is answered", where)
    if not known:
        raise InvalidRequest(f"`{where}`: a tool's message must follow an assistant's message with `tool_calls`", where)
    if call_id not in known:
        raise InvalidRequest(f"`{where}`: no call of the assistant's message before it has the id {call_id!r}", where)
    if call_id not in open_ids:
        raise InvalidRequest(f"`{where}`: the call {call_id!r} has been answered already", where)


def _check_answered(open_ids: set[str], where: str) -> None:
    if open_ids:
        missing = ", ".join(repr(each) for each in sorted(open_ids))
        raise InvalidRequest(
            f"`{where}`: an assistant's message with `tool_calls` must be followed by a tool's message for each; "
            f"there is none for {missing}",
            where,
        )
