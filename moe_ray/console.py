"""The terminal: progress bars in one place and one look, and text for streams that cannot show every character."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int], None]
"""Called with (what, done, total); bytes when total is large, steps when it is small, 0 where it is unknown."""

_BYTES_FROM = 100_000


def accept_every_character() -> None:
    r"""Let this process's output streams take any text: what their encoding lacks is written as \u escapes.

    Text on standard input that is not in its encoding is read with U+FFFD in its place.
    """
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        reconfigure = getattr(stream, "reconfigure", None)  # a stream put there by a test or an embedder may lack it
        if reconfigure is not None:
            encoding = "utf-8" if stream is sys.stdin and not shows_unicode(stream) else None
            reconfigure(encoding=encoding, errors=errors)


def shows_unicode(stream: IO[str]) -> bool:
    """Whether the encoding of `stream` has every character; a stream in memory has none, and takes them all."""
    encoding: str | None = getattr(stream, "encoding", None)
    return encoding is None or encoding.lower().replace("_", "-").startswith("utf")


@contextmanager
def loading_bars(console: Console) -> Iterator[Report]:
    """Draw one bar per name that is reported; a new name adds a bar.

    A bar without a total moves without a number until another name is reported, or all ends.
    """
    unicode = shows_unicode(console.file)
    with Progress(
        SpinnerColumn("dots" if unicode else "line", finished_text="[green]✓[/]" if unicode else "[green]+[/]"),
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[amount]:>20}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bars: dict[str, TaskID] = {}

        without_total: set[str] = set()

        def finish(names: set[str]) -> None:
            for name in names:
                progress.update(bars[name], completed=1, total=1)
            without_total.difference_update(names)

        def report(what: str, done: int, total: int) -> None:
            finish(without_total - {what})
            if what not in bars:
                bars[what] = progress.add_task(what, total=None, amount="")
            if total:
                without_total.discard(what)
                progress.update(bars[what], completed=done, total=total, amount=_amount(done, total))
            else:
                without_total.add(what)

        yield report
        finish(set(without_total))


def _amount(done: int, total: int) -> str:
    if total >= _BYTES_FROM:
        return f"{done / 2**20:,.0f} / {total / 2**20:,.0f} MiB"
    return f"{done} / {total}"
