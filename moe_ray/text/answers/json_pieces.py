"""JSON that arrives in pieces: where a value ends, and the object of a tool's call while it is being written."""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto
from typing import Final

WHITESPACE: Final = " \t\r\n"
ARGUMENT_KEYS: Final = ("arguments", "parameters")
_KEYS_BEFORE: Final = {"name", "id", "type", *ARGUMENT_KEYS}
"""What may stand in a call before both name and arguments are known. Any other key: it is no call."""
_LONGEST_KEY: Final = 64
_CLOSING: Final = {"{": "}", "[": "]"}


class ValueScanner:
    """Finds the end of one JSON value. Brackets and strings are followed; whether it is valid JSON is not checked.

    >>> ValueScanner().feed('{"a": "}"}, "b"')
    10
    """

    def __init__(self) -> None:
        self.done = False
        self._open: list[str] = []
        self._begun = False
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the value, which is done where its end is among or behind them.

        A number, true, false or null is done with the first character behind it.
        """
        for at, character in enumerate(text):
            if self._in_string:
                if self._string_ends(character) and not self._open:
                    return self._end(at + 1)
            elif character == '"':
                self._in_string = self._begun = True
            elif character in _CLOSING:
                self._open.append(_CLOSING[character])
                self._begun = True
            elif self._open:
                if character == self._open[-1]:
                    self._open.pop()
                    if not self._open:
                        return self._end(at + 1)
            elif character in ",}]" or (self._begun and character in WHITESPACE):
                return self._end(at)
            elif character not in WHITESPACE:
                self._begun = True
        return len(text)

    def _string_ends(self, character: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
        return not self._in_string

    def _end(self, at: int) -> int:
        self.done = True
        return at


class _Wants(Enum):
    """What comes next in a call's object."""

    BRACE = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    REST_OF_VALUE = auto()
    ARGUMENTS = auto()
    COMMA = auto()


class CallObject:
    """Reads `{"name": "…", "arguments": {…}}` in pieces; `names` are those of the tools that there are.

    Keys may come in any order; `parameters` is another name of `arguments`, which may also be the text of a JSON
    object, null or absent. Arguments are told as they come, if the name came before.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.name = ""
        self.begun = False
        """It is a call, and its name is known. Never taken back."""
        self.done = False
        """It has ended; `rest` is behind it."""
        self.broken = False
        """It is no call."""
        self.rest = ""
        self._names = names
        self._wants = _Wants.BRACE
        self._key = ""
        self._value = ""
        self._arguments: str | None = None
        """Complete ones that came before the name."""
        self._scanner = ValueScanner()

    def feed(self, text: str) -> str:
        """Take the next piece; returns the further piece of the arguments' JSON text."""
        told = ""
        self.rest += text
        while self.rest and not (self.done or self.broken):
            if self._wants is _Wants.ARGUMENTS:
                used = self._scanner.feed(self.rest)
                told += self._take(used)
                if self._scanner.done:
                    self._wants = _Wants.COMMA
            elif self._wants is _Wants.REST_OF_VALUE:
                self._value += self._take(self._scanner.feed(self.rest))
                if self._scanner.done:
                    self._wants = _Wants.COMMA
                    told += self._value_read()
            else:
                self.rest = self.rest.lstrip(WHITESPACE)
                if not self.rest or not self._next():
                    break
        if self.done and not self.begun:
            told += self._begin(self._arguments or "{}")
        return told

    def _next(self) -> bool:
        """Take what comes between values; False where it is not all there yet."""
        first = self.rest[0]
        if self._wants is _Wants.BRACE:
            self._expect("{", _Wants.FIRST_KEY)
        elif self._wants is _Wants.COLON:
            self._expect(":", _Wants.VALUE)
        elif self._wants is _Wants.VALUE:
            self._scanner = ValueScanner()
            self._value = ""
            streamed = self._key in ARGUMENT_KEYS and first == "{" and self.name and not self.begun
            self._wants = _Wants.ARGUMENTS if streamed else _Wants.REST_OF_VALUE
            self.begun = self.begun or bool(streamed)
        elif first == "}" and self._wants in (_Wants.FIRST_KEY, _Wants.COMMA):
            self._take(1)
            self.broken = not self.name
            self.done = not self.broken
        elif self._wants is _Wants.COMMA:
            self._expect(",", _Wants.KEY)
        else:
            return self._read_key()
        return True

    def _read_key(self) -> bool:
        if self.rest[0] != '"':
            self._fail()
            return True
        scanner = ValueScanner()
        used = scanner.feed(self.rest)
        if not scanner.done:
            if used > _LONGEST_KEY and not self.begun:
                self._fail()
            return False
        self._key = self._take(used)[1:-1]
        if not self.begun and self._key not in _KEYS_BEFORE:
            self._fail()
        self._wants = _Wants.COLON
        return True

    def _value_read(self) -> str:
        """Account for a value that is complete; the arguments, where a call begins with it."""
        if self.begun:
            return ""
        try:
            value = json.loads(self._value)
        except ValueError:
            self._fail()
            return ""
        if self._key == "name":
            if not isinstance(value, str) or value not in self._names or self.name:
                self._fail()
                return ""
            self.name = value
            return self._begin(self._arguments) if self._arguments is not None else ""
        if self._key in ARGUMENT_KEYS:
            self._arguments = _object_text(value, self._value)
            if self._arguments is None:
                self._fail()
            elif self.name:
                return self._begin(self._arguments)
        return ""

    def _begin(self, arguments: str) -> str:
        self.begun = True
        return arguments

    def _expect(self, character: str, then: _Wants) -> None:
        if self.rest[0] == character:
            self._take(1)
            self._wants = then
        else:
            self._fail()

    def _fail(self) -> None:
        """No call; or, where it has begun, its end."""
        self.done, self.broken = self.begun, not self.begun

    def _take(self, count: int) -> str:
        taken = self.rest[:count]
        self.rest = self.rest[count:]
        return taken


def _object_text(value: object, text: str) -> str | None:
    """JSON text of the arguments that a value is; None if it is none."""
    if value is None:
        return "{}"
    if isinstance(value, dict):
        return text
    if isinstance(value, str):
        try:
            return value if isinstance(json.loads(value), dict) else None
        except ValueError:
            return None
    return None
