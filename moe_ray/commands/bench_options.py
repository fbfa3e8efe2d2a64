"""The options that benches share, and the running of one bench: progress bars around it, its report after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from moe_ray.commands.completion import models
from moe_ray.commands.options import JsonOutput, error_console
from moe_ray.console import loading_bars
from moe_ray.errors import NotReady

if TYPE_CHECKING:
    from moe_ray.bench.report import Plot, Report
    from moe_ray.console import Report as Progress

Options = TypeVar("Options")

_MODEL_HELP = "A directory, a repo id, or `demo`."
BenchModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help=_MODEL_HELP, show_default="M1", autocompletion=models),
]
SmallModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help=_MODEL_HELP, show_default="a small random one", autocompletion=models),
]
WideModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help=_MODEL_HELP, show_default="a random, wide one", autocompletion=models),
]
Concurrency = Annotated[str, typer.Option(help="Requests in flight: a list of numbers.")]
Streams = Annotated[int, typer.Option(min=1, help="Requests in flight.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs per concurrency, in turn; medians are reported.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of every prompt; no two prompts begin alike.")]
OutputTokens = Annotated[int, typer.Option(min=1, help="Tokens of every answer.")]
DecodedTokens = Annotated[int, typer.Option(min=2, help="Tokens of every answer.")]
InstructionSets = Annotated[
    str | None, typer.Option("--kernels", help="Instruction sets: a list.", show_default="this machine's best")
]
Threads = Annotated[int | None, typer.Option(min=1, show_default="all cores")]
RepeatsOfEach = Annotated[int, typer.Option(min=1, help="Runs of each, in turn; medians are reported.")]
Seed = Annotated[int, typer.Option(help="Of the prompts.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="PNG file to draw.")]

__all__ = [
    "BenchModel",
    "Concurrency",
    "DecodedTokens",
    "InstructionSets",
    "JsonOutput",
    "OutputTokens",
    "PlotFile",
    "PromptTokens",
    "Repeats",
    "RepeatsOfEach",
    "Seed",
    "SmallModel",
    "Streams",
    "Threads",
    "WideModel",
    "run_bench",
]


def run_bench(
    bench: Callable[[Options, Progress], Report],
    options: Options,
    axes: Plot,
    json_output: bool,
    plot: Path | None,
    curves: Callable[[Report], Report] | None = None,
) -> None:
    """Run one bench under progress bars and publish what it measured. Raises `ConfigError` before for a bad `plot`."""
    from moe_ray.bench.report import check_plot, publish

    check_plot(plot)
    console = error_console()
    with loading_bars(console) as progress:
        try:
            report = bench(options, progress)
        except BrokenPipeError as error:  # which the command line takes for the reader of its output, and ends silently
            raise NotReady("a process of the bench has closed its end of a pipe or connection") from error
    publish(report, json_output=json_output, plot=plot, axes=axes, console=console, curves=curves)
