"""Progress bars as they are drawn: numbers where a total is known, and none where it is not."""

from __future__ import annotations

import io

from rich.console import Console

from moe_ray.console import Report, loading_bars


def drawn(*reports: tuple[str, int, int]) -> str:
    """What a terminal of 100 columns shows in the end."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, no_color=True)
    with loading_bars(console) as report:
        send(report, reports)
    return out.getvalue()


def send(report: Report, reports: tuple[tuple[str, int, int], ...]) -> None:
    for what, done, total in reports:
        report(what, done, total)


def last_lines(text: str) -> dict[str, str]:
    """The last state of each bar by its name."""
    return {line.split()[1]: line for line in text.replace("\r", "\n").split("\n") if len(line.split()) > 2}


def test_no_bar_counts_to_nothing() -> None:
    text = drawn(("verify", 0, 0), ("read", 0, 0), ("upcycle", 0, 30), ("upcycle", 30, 30), ("Expert3", 0, 0))
    assert "0 / 0" not in text
    lines = last_lines(text)
    assert "30 / 30" in lines["upcycle"]
    for name in ("verify", "read", "Expert3"):
        assert "✓" in lines[name], "what came before is done"


def test_a_total_that_becomes_known() -> None:
    lines = last_lines(drawn(("Expert0", 0, 0), ("Expert0", 5 * 2**20, 10 * 2**20)))
    assert "5 / 10 MiB" in lines["Expert0"]
    assert "✓" not in lines["Expert0"]


def test_bars_with_totals_run_side_by_side() -> None:
    lines = last_lines(drawn(("Expert0", 1, 4), ("Expert1", 2, 4), ("Expert0", 4, 4)))
    assert "4 / 4" in lines["Expert0"]
    assert "2 / 4" in lines["Expert1"]
