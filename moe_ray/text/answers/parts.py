"""What the text of an answer is made of: text for people, and calls of tools. No torch, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """A further piece of text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The model calls a tool: its name is known, its arguments follow."""

    index: int
    """Of the calls of one answer, from 0."""
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A further piece of the JSON text of a call's arguments; the pieces joined are one JSON object."""

    index: int
    json: str


Part = Text | CallBegun | CallArguments


@dataclass(slots=True)
class ToolCall:
    """One call of an answer."""

    call_id: str
    name: str
    arguments: str
    """JSON text of an object."""


class AnswerReader(Protocol):
    """Takes one answer's text as it arrives apart. An answer that does not follow the format is text, never lost."""

    @property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that the text must hold although others are left out: they are its markers."""
        ...

    def push(self, text: str) -> list[Part]:
        """The parts that are certain with this text; none while it may be the beginning of something else."""
        ...

    def finish(self) -> list[Part]:
        """What is left when the text has ended. Once, at the end."""
        ...


class PlainReader:
    """Reads answers that hold nothing but text."""

    shown_ids: frozenset[int] = frozenset()

    def push(self, text: str) -> list[Part]:
        """The text itself."""
        return [Text(text)] if text else []

    def finish(self) -> list[Part]:
        """Nothing: no text is ever held back."""
        return []


class Answer:
    """One answer, put together from its parts."""

    def __init__(self) -> None:
        self.content = ""
        self.calls: list[ToolCall] = []

    def take(self, parts: list[Part]) -> None:
        """Add what came."""
        for part in parts:
            match part:
                case Text(text):
                    self.content += text
                case CallBegun(_, call_id, name):
                    self.calls.append(ToolCall(call_id, name, ""))
                case CallArguments(index, json):
                    self.calls[index].arguments += json
