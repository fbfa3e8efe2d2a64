"""What `moe-ray doctor` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.markup import escape

from moe_ray.console import shows_unicode
from moe_ray.doctor.finding import Finding, Level

MARKS: Final[dict[Level, tuple[str, str, str]]] = {
    "ok": ("green", "✓", "+"),
    "warning": ("yellow", "!", "!"),
    "error": ("bold red", "✗", "x"),
}
"""Level → style, mark, mark in ASCII."""
_WIDTH: Final = 15


def print_finding(console: Console, finding: Finding) -> None:
    """Print one line, and a second one on how to mend it."""
    style, mark, ascii_mark = MARKS[finding.level]
    shown = mark if shows_unicode(console.file) else ascii_mark
    console.print(f"[{style}]{shown}[/] {finding.check:<{_WIDTH}}{escape(finding.says)}", soft_wrap=True)
    if finding.mend:
        console.print(f"  {'':<{_WIDTH}}mend: {finding.mend}", style="dim", markup=False, soft_wrap=True)


def print_summary(console: Console, found: Sequence[Finding]) -> None:
    """Print how many of each level there are."""
    counts = {level: sum(finding.level == level for finding in found) for level in ("error", "warning")}
    said = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items())
    console.print(f"\n{said}, {len(found) - sum(counts.values())} ok", style="bold")
