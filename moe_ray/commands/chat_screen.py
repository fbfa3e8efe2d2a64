"""How an answer appears while it comes: as plain text, or as Markdown in a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Final

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from moe_ray.console import shows_unicode

EVERY_S: Final = 0.08
"""The least time between two drawings of what is not settled yet."""
_CONTROL: Final = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)])
_HARMLESS: Final = {ord("\n"): "\n", ord("\t"): "\t", 0x85: "\n"}

Write = Callable[[str], None]


def draws_markdown(console: Console) -> bool:
    """Whether Markdown can be drawn, and drawn again, on `console`."""
    return console.is_terminal and not console.is_dumb_terminal and shows_unicode(console.file)


@contextmanager
def answer_screen(console: Console, markdown: bool) -> Iterator[Write]:
    """A function that shows each further piece of one answer; what came is there in full at the end, whatever ends it.

    In a terminal, control characters are left out: an answer must not move its cursor or set its title.
    """
    if not markdown:
        pieces = Plain(console)
        try:
            yield pieces.write
        finally:
            pieces.end()
        return
    drawn = Drawn(console)
    with drawn.live:
        try:
            yield drawn.write
        finally:
            drawn.end()


def printable(text: str) -> str:
    """`text` without what a terminal would obey."""
    return text.translate({**_CONTROL, **_HARMLESS})


class Plain:
    """Pieces as they come."""

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._clean = printable if console.is_terminal else str

    def write(self, piece: str) -> None:
        """Show a piece at once."""
        self._file.write(self._clean(piece))
        self._file.flush()

    def end(self) -> None:
        """End the line."""
        self._file.write("\n")
        self._file.flush()


class Drawn:
    """Markdown: blocks that are complete are printed for good, the last one is drawn anew as it grows."""

    def __init__(self, console: Console) -> None:
        self.live = Live(Text("…", style="dim"), console=console, auto_refresh=False, transient=True)
        self._console = console
        self._text = ""
        """What is not printed for good yet."""
        self._drawn_at = 0.0

    def write(self, piece: str) -> None:
        """Take a piece; it is seen within `EVERY_S` of the next one."""
        self._text += printable(piece)
        if "\n" in piece and (settled := settled_length(self._text)):
            self._console.print(Markdown(self._text[:settled]))
            self._console.print()
            self._text = self._text[settled:]
        now = time.monotonic()
        if now - self._drawn_at >= EVERY_S:
            self._drawn_at = now
            self.live.update(Tail(Markdown(self._text)), refresh=True)

    def end(self) -> None:
        """Print the last block for good."""
        self.live.update(Text(""), refresh=True)
        if self._text.strip():
            self._console.print(Markdown(self._text))


class Tail:
    """The last lines of something that may be higher than the terminal."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._inner, options, pad=False)
        for line in lines[-max(console.height - 1, 1) :]:
            yield from line
            yield Segment.line()


def settled_length(text: str) -> int:
    r"""Characters of Markdown text before its last block: nothing that follows changes how they look.

    >>> settled_length("One.\n\n- two\n"), settled_length("One.\nStill one.")
    (6, 0)
    """
    from markdown_it import MarkdownIt

    tokens = MarkdownIt().enable("table").parse(text)
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map is not None]
    changes = [later for earlier, later in pairwise(starts) if later > earlier]
    if not changes:
        return 0
    return sum(len(line) + 1 for line in text.split("\n")[: changes[-1]])
