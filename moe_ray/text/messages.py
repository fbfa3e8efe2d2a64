"""The messages of a chat request as chat templates take them: a role and one string of content each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_ray.errors import InvalidRequest

Message = Mapping[str, Any]  # {"role": str, "content": str | [{"type": "text", "text": str}], further keys}


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with each content as one string; raises `InvalidRequest` naming the part that is not text.

    Text parts are joined by newlines, as vLLM does. Only an assistant's content may be missing or null: it is empty.
    """
    if isinstance(messages, str | bytes | Mapping):
        raise InvalidRequest("`messages` must be a list of {role, content}", "messages")
    plain = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"`{where}` must be an object with `role` and `content`", "messages")
        role = message.get("role")
        if not isinstance(role, str):
            raise InvalidRequest(f"`{where}.role` must be a string, got {_kind(role)}", "messages")
        content = message.get("content")
        if content is None:
            if role != "assistant":
                raise InvalidRequest(f"`{where}.content` is required", "messages")
            content = ""
        plain.append({**message, "content": _text(content, f"{where}.content")})
    return plain


def with_system_in_first_user_turn(chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The conversation without system messages, their texts in front of the first user's; None if it cannot be made.

    As Mistral's own code does for models that know no system role: texts are joined by a blank line, empty ones are
    as if they were not there.
    """
    system = [message["content"] for message in chat if message["role"] == "system"]
    if not system:
        return None
    texts = [text for text in system if text]
    turns = [message for message in chat if message["role"] != "system"]
    first = next((i for i, message in enumerate(turns) if message["role"] == "user"), None)
    if first is None:
        return None
    if texts:
        turns[first] = {**turns[first], "content": "\n\n".join([*texts, turns[first]["content"]])}
    return turns


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"`{where}` must be a string or a list of text parts, got {_kind(content)}", "messages")
    if not content:
        raise InvalidRequest(f"`{where}` is a list without parts", "messages")
    return "\n".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"`{where}` must be a text part, got {_kind(part)}", "messages")
    if part.get("type") != "text":
        raise InvalidRequest(f"`{where}` is of type {part.get('type')!r}, only text parts are supported", "messages")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"`{where}.text` must be a string, got {_kind(text)}", "messages")
    return text


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
