"""A conversation as data: the system message, what was asked and answered, and its form as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_ray.errors import ConfigError

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said so far; every change is a new conversation.

    >>> Conversation("Be short.").with_turn("Hi", "Hello.").messages("And?")[-1]
    {'role': 'user', 'content': 'And?'}
    """

    system: str | None = None
    turns: tuple[ChatTurn, ...] = ()

    def messages(self, question: str | None = None) -> list[Message]:
        """As chat APIs take it, with `question` at its end."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        said = [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        return [*opening, *said, *([{"role": "user", "content": question}] if question is not None else [])]

    def with_turn(self, question: str, answer: str) -> Conversation:
        """This conversation, one turn longer."""
        return replace(self, turns=(*self.turns, ChatTurn(question, answer)))

    def without_last(self) -> Conversation:
        """This conversation, one turn shorter; the same where there is none."""
        return replace(self, turns=self.turns[:-1])

    def with_system(self, system: str | None) -> Conversation:
        """This conversation under another system message; None: under none."""
        return replace(self, system=system)

    def cleared(self) -> Conversation:
        """A new conversation under the same system message."""
        return replace(self, turns=())


def to_json(conversation: Conversation, model: str, settings: dict[str, Any]) -> str:
    """A conversation as a file holds it: the body of a chat request without its last question."""
    return json.dumps({"model": model, "messages": conversation.messages(), "settings": settings}, indent=1)


def from_json(text: str, name: str) -> tuple[Conversation, dict[str, Any]]:
    """The conversation and the settings of a file's text. Raises `ConfigError` naming the file and what is wrong."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}: no JSON ({error})") from None
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise ConfigError(f"{name}: expected an object with `messages`, as /save writes it")
    settings = content.get("settings", {})
    if not isinstance(settings, dict):
        raise ConfigError(f"{name}: `settings` must be an object")
    return _conversation(messages, name), settings


def _conversation(messages: Sequence[Any], name: str) -> Conversation:
    for number, message in enumerate(messages):
        said = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not said or message.get("role") not in ("system", "user", "assistant"):
            raise ConfigError(
                f"{name}: `messages[{number}]` must have a role (system, user or assistant) and a text as its content"
            )
    first = 1 if messages and messages[0]["role"] == "system" else 0
    found = Conversation(messages[0]["content"] if first else None)
    if (len(messages) - first) % 2:
        raise ConfigError(f"{name}: `messages`: the last question has no answer")
    for number in range(first, len(messages), 2):
        question, answer = messages[number], messages[number + 1]
        if (question["role"], answer["role"]) != ("user", "assistant"):
            raise ConfigError(f"{name}: `messages[{number}]`: user and assistant must alternate")
        found = found.with_turn(question["content"], answer["content"])
    return found
