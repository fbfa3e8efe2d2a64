"""Server-sent events, as the HTML standard defines them: how we write them, and how our own clients read them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, Final

MEDIA_TYPE: Final = "text/event-stream"
HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
KEEP_ALIVE: Final = ": keep-alive\n\n"
"""A comment: clients ignore it, and nothing between them and us takes the connection for dead."""

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# Line ends by Unicode, though not by JSON or the standard of these events: many clients split lines there.
_LINE_ENDS: Final = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def dumps(value: Any) -> str:
    """JSON in one line, whatever a client takes for a line's end."""
    text = _encode(value)
    return text if text.isascii() else text.translate(_LINE_ENDS)


def event(value: Any, name: str = "") -> str:
    """One event that carries `value` as JSON; some APIs name the kinds of theirs."""
    return f"event: {name}\ndata: {dumps(value)}\n\n" if name else f"data: {dumps(value)}\n\n"


class SseReader:
    """The data of each event in a response body that is fed to it in pieces.

    Lines end at CRLF, LF or CR and nowhere else. An event that the body's end cuts off is dropped.

    >>> reader = SseReader()
    >>> list(reader.feed(b": hello\\n\\ndata: on")), list(reader.feed(b"e\\n\\n"))
    ([], ['one'])
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._line = ""
        """The line that has not ended yet."""
        self._after_return = False
        """The last character was a CR: a LF behind it belongs to the same line end."""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """Yield the data of the events that end in this piece; to be read to its end."""
        text = self._decoder.decode(piece)
        if self._after_return and text:
            text = text.removeprefix("\n")
            self._after_return = False
        self._after_return = self._after_return or text.endswith("\r")
        *lines, self._line = (self._line + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in lines:
            if line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
            elif line == "data":
                self._data.append("")
            elif not line and self._data:
                yield "\n".join(self._data)
                self._data.clear()
