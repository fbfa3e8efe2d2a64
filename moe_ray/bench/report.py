"""What every bench hands over: plain rows with units in their names, as a table, one JSON object, or a plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from moe_ray import __version__
from moe_ray.errors import ConfigError
from moe_ray.telemetry import cores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30
NO_MATPLOTLIB = "--plot needs matplotlib: pip install 'moe-ray[bench]'"

Row = dict[str, str | int | float | None]


@dataclass(frozen=True, slots=True)
class Report:
    """What a bench measured."""

    bench: str
    rows: list[Row]
    """Plain keys with units in their names; every row has the same."""
    facts: dict[str, object]
    """Parameters and machine: what somebody who wants to repeat it must know."""
    more: dict[str, list[Row]] = field(default_factory=dict)
    """Further tables, by name."""
    curve: list[Row] = field(default_factory=list)
    """What is drawn, where that is not the rows; told in neither table nor JSON."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Which keys of the rows are drawn: one line per value of `series`."""

    x: str
    y: str
    series: str | None
    log_x: bool = False
    log_y: bool = False


def machine_facts() -> dict[str, object]:
    """The machine and the versions that were measured; no host names, no paths."""
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "python": platform.python_version(),
        "torch": _installed("torch"),
        "moe_ray": __version__,
    }


def publish(
    report: Report,
    *,
    json_output: bool,
    plot: Path | None,
    axes: Plot,
    console: Console,
    curves: Callable[[Report], Report] | None = None,
) -> None:
    """Print `report` on standard output, as one JSON object or as a table, and draw it into the PNG file `plot`.

    `curves` turns the rows into those that are drawn, where they differ. `console` is told about the plot. Raises
    `ConfigError` where matplotlib is absent or the file cannot be written; by then the numbers are printed.
    """
    if json_output:
        print(as_json(report))
    else:
        print_table(report, Console(highlight=False))
    if plot is not None:
        draw(curves(report) if curves else report, plot, axes)
        console.print(f"wrote {plot}", markup=False, soft_wrap=True)


def as_json(report: Report) -> str:
    """The report as one JSON object."""
    return json.dumps(
        {"bench": report.bench, **report.facts, **report.more, "rows": report.rows}, indent=1, allow_nan=False
    )


def print_table(report: Report, console: Console) -> None:
    """Print a line per row, or, where that is wider than the console, a column per row; further tables; the facts.

    A table that fits neither way is as wide as it must be: numbers are never cut.
    """
    _print_rows(report.rows, console)
    for name, rows in report.more.items():
        console.print(f"\n{name}", style="bold")
        _print_rows(rows, console)
    said = (f"{name} {_cell(value)}" for name, value in report.facts.items() if value is not None)
    console.print("; ".join(said), style="dim", markup=False)


def _print_rows(rows: list[Row], console: Console) -> None:
    keys = list(rows[0]) if rows else []
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    upright = _table(keys, cells)
    turned = _table([keys[0], *(row[0] for row in cells)], _transposed(keys, cells)) if keys else upright
    endless = console.options.update_width(10_000)
    wide, narrow = (Measurement.get(console, endless, each).maximum for each in (upright, turned))
    table, width = (turned, narrow) if wide > console.width >= narrow else (upright, wide)
    Console(file=console.file, highlight=False, width=max(console.width, width)).print(table)


def draw(report: Report, path: Path, axes: Plot) -> None:
    """Draw the rows into a PNG file. Raises `ConfigError` where matplotlib is absent or `path` cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(NO_MATPLOTLIB) from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel: Axes = figure.subplots()
    drawn: dict[str, list[Row]] = {}
    for row in report.rows:
        drawn.setdefault("" if axes.series is None else _cell(row[axes.series]), []).append(row)
    for name, rows in drawn.items():
        points = [(x, y) for row in rows if (x := row[axes.x]) is not None and (y := row[axes.y]) is not None]
        panel.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)  # type: ignore[arg-type]
    if axes.log_x:
        panel.set_xscale("log", base=2)
    if axes.log_y:
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.set(xlabel=axes.x, ylabel=axes.y, title=f"moe-ray bench {report.bench}")
    panel.grid(alpha=0.3)
    if axes.series is not None:
        panel.legend(title=axes.series)
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error.strerror})") from None


def check_plot(path: Path | None) -> None:
    """Raise `ConfigError` where `draw` would, before a long bench rather than after it."""
    if path is None:
        return
    if find_spec("matplotlib") is None:
        raise ConfigError(NO_MATPLOTLIB)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: {path.parent} is not a directory")


def _table(columns: list[str], cells: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    return table


def _transposed(keys: list[str], cells: list[list[str]]) -> list[list[str]]:
    return [[key, *(row[i] for row in cells)] for i, key in enumerate(keys) if i]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return "-" if value is None else str(value)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
