"""Progress bars for whatever takes long, in one place and one look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int], None]
"""Called with (what, done, total); bytes when total is large, steps when it is small."""

_BYTES_FROM = 100_000


@contextmanager
def loading_bars(console: Console) -> Iterator[Report]:
    """Draw one bar per name that is reported; a new name adds a bar."""
    with Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[amount]:>20}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bars: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=max(total, 1), amount="")
            progress.update(
                bars[what], completed=done if total else 1, total=max(total, 1), amount=_amount(done, total)
            )

        yield report


def _amount(done: int, total: int) -> str:
    if total >= _BYTES_FROM:
        return f"{done / 2**20:,.0f} / {total / 2**20:,.0f} MiB"
    return f"{done} / {total}"
