"""`moe-ray bench gpu`: one card. What the bench needs is loaded when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_ray.commands.bench_options import (
    Concurrency,
    DecodedTokens,
    JsonOutput,
    PlotFile,
    PromptTokens,
    Repeats,
    run_bench,
)
from moe_ray.commands.options import EnforceEager, names, numbers


def gpu(
    shape: Annotated[str, typer.Option(help="mixtral-8x7b, mixtral-8x22b or tiny.")] = "mixtral-8x7b",
    weights: Annotated[str, typer.Option(help="Formats, one after the other: bfloat16, float16, int8, int4.")] = "int4",
    parts: Annotated[str, typer.Option(help="Which of kernels, engine.")] = "kernels,engine",
    carriers: Annotated[
        str,
        typer.Option(
            help="local: in one process; socket, grpc, ipc (mailboxes): a process for the trunk and each expert."
        ),
    ] = "local,socket",
    concurrency: Concurrency = "1,8,32,128",
    rows: Annotated[str, typer.Option(help="Of the kernels' table: a list of numbers.")] = "1,2,4,8,16,32,128",
    prompt_tokens: PromptTokens = 128,
    output_tokens: DecodedTokens = 64,
    long_prompt: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one long prompt that is timed beside.", show_default="none")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers.", show_default="the shape's")] = None,
    kernels: Annotated[str, typer.Option(help="As model.kernels.")] = "auto",
    enforce_eager: EnforceEager = None,
    repeats: Repeats = 1,
    cpu_dry_run: Annotated[
        bool, typer.Option("--cpu-dry-run", help="The same script on a tiny shape, on the CPU, in an interpreter.")
    ] = False,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """One card: a model's shapes with random weights, in one process, then trunk and experts in a process each."""
    from moe_ray.bench.gpu import PLOT, run_gpu
    from moe_ray.bench.gpu_options import GpuBenchOptions

    options = GpuBenchOptions(
        shape=shape,
        weights=names(weights),
        parts=names(parts),
        carriers=names(carriers),
        concurrency=numbers(concurrency, "--concurrency"),
        rows=numbers(rows, "--rows"),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        long_prompt=long_prompt,
        num_layers=layers,
        kernels=kernels,
        enforce_eager=bool(enforce_eager),
        repeats=repeats,
        cpu_dry_run=cpu_dry_run,
    )
    run_bench(run_gpu, options, PLOT, json_output, plot)
