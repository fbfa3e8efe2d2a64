"""Takes answers that may hold calls of tools apart, while they arrive: one machine for every format of calls."""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import Enum, auto
from typing import Final

from moe_ray.text.answers.json_pieces import WHITESPACE, CallObject, ValueScanner
from moe_ray.text.answers.parts import CallArguments, CallBegun, Part, Text
from moe_ray.text.answers.syntax import CallSyntax

_NAMED: Final = re.compile(r"(?P<name>[\w.-]+)\s*(\[CALL_ID\]\s*[\w-]*\s*)?(\[ARGS\]\s*)?")
_NAMED_SO_FAR: Final = re.compile(r"[\w.-]*\s*(\[[A-Z_]*(\]\s*[\w-]*\s*)?)*")
_LONGEST_HEAD: Final = 256


class _Reading(Enum):
    """Where in an answer the reader is."""

    TEXT = auto()
    OPENED = auto()
    NAME = auto()
    OBJECT = auto()
    ARGUMENTS = auto()
    AFTER = auto()
    CLOSING = auto()


class CallReader:
    """Takes one answer apart: text, and calls of the tools of `names` in one syntax.

    Whitespace around calls is part of the syntax. What opens like a call and is none is text, and so is a further
    call where not `parallel`.
    """

    def __init__(
        self,
        syntax: CallSyntax,
        names: Collection[str],
        parallel: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.shown_ids: Final = shown_ids
        """Special tokens that are markers: the text that is pushed must hold them."""
        self._syntax, self._names, self._parallel = syntax, names, parallel
        self._openers = [opener for opener, _ in syntax.markers]
        self._buffer = ""
        self._raw = ""
        """Taken from the buffer, and text again if no call comes of it."""
        self._reading = _Reading.TEXT
        self._fresh = True
        """Nothing but whitespace stands before the buffer: in the line, or in the answer."""
        self._in_array = False
        self._end = ""
        self._object = CallObject(names)
        self._scanner = ValueScanner()
        self._num_calls = 0
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """The parts that are certain with this text; none while it may be the beginning of something else."""
        self._buffer += text
        while self._buffer and self._step():
            pass
        return self._told()

    def finish(self) -> list[Part]:
        """What is left when the text has ended. Once, at the end."""
        while self._reading in (_Reading.OPENED, _Reading.NAME) or (
            self._reading is _Reading.OBJECT and not self._object.begun
        ):
            if self._num_calls and not (self._raw + self._buffer).strip(f"{WHITESPACE},;"):
                break  # a further call was to follow
            self._give_up()
            while self._buffer and self._step():
                pass
        if self._reading is _Reading.TEXT and (self._buffer.strip() or not self._num_calls):
            self._say(self._buffer)
        self._buffer = ""
        return self._told()

    def _step(self) -> bool:
        """Take the next thing out of the buffer; False where more text must come first."""
        match self._reading:
            case _Reading.TEXT:
                return self._read_text()
            case _Reading.OBJECT:
                self._read_object()
                return True
            case _Reading.ARGUMENTS:
                self._read_arguments()
                return True
        trimmed = self._buffer.lstrip(WHITESPACE)
        self._raw += self._buffer[: len(self._buffer) - len(trimmed)]
        self._buffer = trimmed
        if not trimmed:
            return False
        match self._reading:
            case _Reading.OPENED:
                self._read_opened()
                return True
            case _Reading.NAME:
                return self._read_name()
            case _Reading.AFTER:
                self._read_after()
                return True
        return self._read_closing()

    def _read_text(self) -> bool:
        at, opener, end = self._find_opener()
        if not opener:
            keep = self._may_open()
            self._say(self._buffer[: len(self._buffer) - keep])
            self._buffer = self._buffer[len(self._buffer) - keep :]
            return False
        if any(other != opener and other.startswith(self._buffer[at:]) for other in self._openers):
            return False  # may become the longer one of two
        before = self._buffer[:at].rstrip(WHITESPACE)
        behind = at if opener[0] == "{" or opener == "[" else at + len(opener)
        self._say(before)
        self._raw = self._buffer[len(before) : behind]
        self._buffer = self._buffer[behind:]
        self._end = end
        self._reading = _Reading.OPENED
        return bool(self._buffer)

    def _read_opened(self) -> None:
        first = self._buffer[0]
        if self._num_calls and not self._parallel:
            self._give_up()
        elif first == "{":
            self._object = CallObject(self._names)
            self._reading = _Reading.OBJECT
        elif first == "[" and self._syntax.array and not self._in_array:
            self._in_array = True
            self._take(1)
        elif self._syntax.named and not self._in_array:
            self._reading = _Reading.NAME
        else:
            self._give_up()

    def _read_object(self) -> None:
        known = self._object.begun
        self._raw += self._buffer
        arguments = self._object.feed(self._buffer)
        self._buffer = ""
        if self._object.broken:
            self._give_up()
            return
        if self._object.begun:
            self._raw = ""
            if not known:
                self._begin(self._object.name)
            self._argue(arguments)
        if self._object.done:
            self._buffer = self._object.rest
            self._reading = _Reading.AFTER

    def _read_name(self) -> bool:
        head, brace, _ = self._buffer.partition("{")
        match = _NAMED.fullmatch(head)
        if brace and match and match["name"] in self._names:
            self._begin(match["name"])
            self._raw = ""
            self._buffer = self._buffer[len(head) :]
            self._scanner = ValueScanner()
            self._reading = _Reading.ARGUMENTS
        elif brace or len(head) > _LONGEST_HEAD or not _NAMED_SO_FAR.fullmatch(head):
            self._give_up()
        else:
            return False
        return True

    def _read_arguments(self) -> None:
        used = self._scanner.feed(self._buffer)
        self._argue(self._buffer[:used])
        self._buffer = self._buffer[used:]
        if self._scanner.done:
            self._reading = _Reading.AFTER

    def _read_after(self) -> None:
        first = self._buffer[0]
        if self._in_array and first in ",]":
            self._take(1)
            if first == ",":
                self._reading = _Reading.OPENED
            else:
                self._close()
        elif self._in_array:
            self._give_up()
        elif not self._end and first in self._syntax.separators:
            self._take(1)
            self._reading = _Reading.OPENED
        else:
            self._close()

    def _close(self) -> None:
        """The calls are complete; what closes them may follow."""
        if self._in_array:
            self._raw = ""
        self._in_array = False
        if self._end:
            self._reading = _Reading.CLOSING
        else:
            self._read_on()

    def _read_closing(self) -> bool:
        if self._buffer.startswith(self._end):
            self._buffer = self._buffer[len(self._end) :]
            self._raw = ""
            self._end = ""
        elif self._end.startswith(self._buffer):
            return False
        self._read_on()
        return True

    def _read_on(self) -> None:
        """Calls have ended: text may come, or further calls."""
        self._buffer = self._raw + self._buffer
        self._raw = ""
        self._fresh = True
        self._in_array = False
        self._reading = _Reading.TEXT

    def _give_up(self) -> None:
        """It is no call: its first character is text, and the rest is looked at again."""
        text = self._raw + self._buffer
        first = len(text) - len(text.lstrip(WHITESPACE)) + 1
        self._say(text[:first])
        self._raw = ""
        self._buffer = text[first:]
        self._in_array = False
        self._reading = _Reading.TEXT

    def _find_opener(self) -> tuple[int, str, str]:
        """Where calls open in the buffer, with what, and what will close them; the opener is "" where none is."""
        found = (len(self._buffer), "", "")
        if self._num_calls and not self._parallel:
            return found
        for opener, end in self._syntax.markers:
            at = self._buffer.find(opener)
            while at >= 0 and not self._may_stand(at):
                at = self._buffer.find(opener, at + 1)
            if at >= 0 and (at, -len(opener)) < (found[0], -len(found[1])):
                found = (at, opener, end)
        return found

    def _may_open(self) -> int:
        """Characters at the buffer's end that may be the beginning of calls, or whitespace before them."""
        if self._num_calls and not self._parallel:
            return 0
        text, keep = self._buffer, 0
        for opener in self._openers:
            longest = min(len(text), len(opener) - 1)
            fits = (n for n in range(longest, keep, -1) if text.endswith(opener[:n]) and self._may_stand(len(text) - n))
            keep = next(fits, keep)
        before = text[: len(text) - keep]
        spaces = len(before) - len(before.rstrip(WHITESPACE))
        return keep + (spaces if self._syntax.where != "start" or self._may_stand(len(before)) else 0)

    def _may_stand(self, at: int) -> bool:
        """Whether calls may open at this place of the buffer."""
        if self._syntax.where == "anywhere":
            return True
        line = self._buffer[:at]
        fresh = self._fresh
        if self._syntax.where == "line" and "\n" in line:
            line = line[line.rindex("\n") :]
            fresh = True
        return fresh and not line.strip()

    def _take(self, count: int) -> None:
        self._raw += self._buffer[:count]
        self._buffer = self._buffer[count:]

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._parts and isinstance(self._parts[-1], Text):
            text = self._parts.pop().text + text  # type: ignore[union-attr]
        self._parts.append(Text(text))
        last = text.rpartition("\n")[2] if self._syntax.where == "line" else text
        self._fresh = not last.strip() and (self._fresh or last is not text)

    def _begin(self, name: str) -> None:
        self._parts.append(CallBegun(self._num_calls, self._syntax.call_id(), name))
        self._num_calls += 1

    def _argue(self, json: str) -> None:
        if json:
            self._parts.append(CallArguments(self._num_calls - 1, json))

    def _told(self) -> list[Part]:
        told = self._parts
        self._parts = []
        return told
