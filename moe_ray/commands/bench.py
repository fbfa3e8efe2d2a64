"""`moe-ray bench …`: parses flags, runs one bench, publishes its report. What a bench needs is loaded when it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from moe_ray.errors import ConfigError

if TYPE_CHECKING:
    from moe_ray.bench.report import Plot, Report
    from moe_ray.console import Report as Progress

Options = TypeVar("Options")

bench_app = typer.Typer(
    help="Measure this machine and what runs on it: a table, or one JSON object.", no_args_is_help=True
)
console = Console(stderr=True, highlight=False)

BenchModel = Annotated[
    str | None, typer.Option("--model", "-m", help="A directory, a Hugging Face repo id, or `demo`.", show_default="M1")
]
Concurrency = Annotated[str, typer.Option(help="Requests in flight: a list of numbers.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs per concurrency, in turn; medians are told.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of every prompt; no two prompts begin alike.")]
OutputTokens = Annotated[int, typer.Option(min=1, help="Tokens of every answer.")]
Seed = Annotated[int, typer.Option(help="Of the prompts.")]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="PNG file to draw.")]


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """The positive numbers of a comma-separated list, each once. Raises `ConfigError` naming `flag`."""
    try:
        found = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(f"{flag}: expected numbers from 1, as in 1,8,32, got {text!r}")
    return found


@bench_app.command()
def serve(
    url: Annotated[
        str | None, typer.Option(help="A running OpenAI-compatible server.", show_default="start ours")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="With --url: its name there. Else what to serve.", show_default="M1"),
    ] = None,
    concurrency: Concurrency = "1,8,32",
    requests: Annotated[
        int | None, typer.Option(min=1, help="Per run.", show_default="the concurrency, at least 4")
    ] = None,
    repeats: Repeats = 3,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 64,
    send: Annotated[Literal["ids", "text"], typer.Option(help="How prompts go out.")] = "ids",
    tokenizer: Annotated[
        str | None, typer.Option(help="With --url: the model whose tokenizer makes the prompts, as for --model.")
    ] = None,
    extra: Annotated[str, typer.Option(help="JSON object merged into every request.")] = "{}",
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.")] = None,
    seed: Seed = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without a byte that end a request.")] = 600.0,
    pid: Annotated[int | None, typer.Option(help="With --url: the server's process, to tell its memory.")] = None,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Load a server with streaming completions: first token, inter-token latency, tokens/s, errors."""
    from moe_ray.bench.report import check_plot
    from moe_ray.bench.serve import PLOT, ServeBenchOptions, run_serve

    check_plot(plot)
    options = ServeBenchOptions(
        url=url,
        model=model,
        concurrency=numbers(concurrency, "--concurrency"),
        requests=requests,
        repeats=repeats,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        send=send,
        tokenizer=tokenizer,
        extra=_json_object(extra, "--extra"),
        api_key=api_key,
        seed=seed,
        timeout_s=timeout,
        pid=pid,
    )
    _run(run_serve, options, PLOT, json_output, plot)


@bench_app.command()
def roofline(
    model: BenchModel = None,
    concurrency: Concurrency = "1,8,32",
    repeats: Repeats = 3,
    prompt_tokens: PromptTokens = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of every answer.")] = 64,
    seed: Seed = 0,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Measure memory bandwidth and matrix speed, what they allow for the model, and how much of it we reach."""
    from moe_ray.bench.report import check_plot
    from moe_ray.bench.roofline import PLOT, RooflineOptions, curves, run_roofline

    check_plot(plot)
    options = RooflineOptions(model, numbers(concurrency, "--concurrency"), repeats, prompt_tokens, output_tokens, seed)
    _run(run_roofline, options, PLOT, json_output, plot, curves)


@bench_app.command()
def transport(
    carriers: Annotated[str, typer.Option(help="Which of raw (a bare socket), socket, grpc, ray.")] = (
        "raw,socket,grpc,ray"
    ),
    fan_out: Annotated[str, typer.Option(help="Replicas that a round sends to: a list of numbers.")] = "1,2,8",
    message_bytes: Annotated[
        str, typer.Option("--bytes", help="Rows sent to each and sent back: a list of numbers.")
    ] = "8192,65536",
    rounds: Annotated[int, typer.Option(min=1, help="Per carrier, fan-out and size; the carriers take turns.")] = 1000,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Time scatter and gather on every carrier, against a bare socket between the same processes."""
    from moe_ray.bench.report import check_plot
    from moe_ray.bench.transport import PLOT, TransportBenchOptions, curves, run_transport

    check_plot(plot)
    options = TransportBenchOptions(
        carriers=_names(carriers),
        fan_out=numbers(fan_out, "--fan-out"),
        message_bytes=numbers(message_bytes, "--bytes"),
        rounds=rounds,
    )
    _run(run_transport, options, PLOT, json_output, plot, curves)


@bench_app.command()
def engine(
    model: BenchModel = None,
    carriers: Annotated[
        str, typer.Option(help="Which of local, socket, grpc, ray; local is always measured, to compare with.")
    ] = "local,socket,grpc,ray",
    concurrency: Concurrency = "1,8,32",
    repeats: Repeats = 3,
    prompt_tokens: PromptTokens = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of every answer.")] = 64,
    micro_batches: Annotated[
        int | None, typer.Option(min=1, help="Of the engines that are spread.", show_default="as configured")
    ] = None,
    trunk_threads: Annotated[
        int | None, typer.Option(min=1, help="Of a trunk with experts elsewhere.", show_default="as configured")
    ] = None,
    expert_threads: Annotated[
        int | None, typer.Option(min=1, help="Of each expert process.", show_default="as configured")
    ] = None,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Generate offline with every expert in its own process, carrier by carrier, against one process on these cores."""
    from moe_ray.bench.engine import PLOT, EngineBenchOptions, run_engine
    from moe_ray.bench.report import check_plot

    check_plot(plot)
    options = EngineBenchOptions(
        model=model,
        carriers=_names(carriers),
        concurrency=numbers(concurrency, "--concurrency"),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        micro_batches=micro_batches,
        trunk_threads=trunk_threads,
        expert_threads=expert_threads,
    )
    _run(run_engine, options, PLOT, json_output, plot)


@bench_app.command()
def chaos(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A directory, a repo id, or `demo`.", show_default="a small random one"),
    ] = None,
    kills: Annotated[int, typer.Option(min=0, help="Of expert replicas, where each expert has two.")] = 50,
    single_kills: Annotated[int, typer.Option(min=0, help="Of experts that have one replica.")] = 10,
    trunk_kills: Annotated[int, typer.Option(min=0, help="Of two trunks.")] = 10,
    streams: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    output_tokens: OutputTokens = 96,
    seed: Annotated[int, typer.Option(help="Of the prompts and the victims.")] = 0,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Kill experts and trunks of a server under load, and compare every answer with an undisturbed one."""
    from moe_ray.bench.lab.chaos import PLOT, ChaosOptions, run_chaos
    from moe_ray.bench.report import check_plot

    check_plot(plot)
    options = ChaosOptions(
        model=model,
        kills=kills,
        single_kills=single_kills,
        trunk_kills=trunk_kills,
        streams=streams,
        output_tokens=output_tokens,
        seed=seed,
    )
    _run(run_chaos, options, PLOT, json_output, plot)


@bench_app.command()
def scale(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A directory, a repo id, or `demo`.", show_default="a small random one"),
    ] = None,
    expert: Annotated[int, typer.Option(min=0, help="That is scaled.")] = 3,
    cycles: Annotated[int, typer.Option(min=1, help="Each: unchanged, a second replica, one again.")] = 5,
    streams: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 4,
    output_tokens: OutputTokens = 96,
    window: Annotated[float, typer.Option(min=1.0, help="Seconds that each phase is measured.")] = 8.0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Give an expert a second replica under load and take it away again: what do running streams notice?"""
    from moe_ray.bench.lab.scale import PLOT, ScaleOptions, run_scale
    from moe_ray.bench.report import check_plot

    check_plot(plot)
    options = ScaleOptions(
        model=model,
        expert=expert,
        cycles=cycles,
        streams=streams,
        output_tokens=output_tokens,
        window_s=window,
        seed=seed,
    )
    _run(run_scale, options, PLOT, json_output, plot)


@bench_app.command()
def cluster(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A directory, a repo id, or `demo`.", show_default="a random, wide one"),
    ] = None,
    carriers: Annotated[str, typer.Option(help="Which of socket, grpc, ray.")] = "socket,grpc,ray",
    streams: Annotated[str, typer.Option(help="Requests in flight: a list of numbers.")] = "1,8",
    expert_hosts: Annotated[int, typer.Option(min=2, max=16, help="Beside the trunk's.")] = 2,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of every answer.")] = 24,
    full: Annotated[bool, typer.Option("--full", help="1, 10, 25 Gbit/s by 0.1, 0.5, 5 ms, for each carrier.")] = False,
    faults: Annotated[bool, typer.Option(help="Cut off and kill an expert host under load, too.")] = True,
    seed: Seed = 0,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Serve from several hosts (network namespaces; needs root) over networks of several speeds, against the plan."""
    from moe_ray.bench.lab.cluster import PLOT, ClusterOptions, run_cluster
    from moe_ray.bench.report import check_plot

    check_plot(plot)
    options = ClusterOptions(
        model=model,
        carriers=_names(carriers),
        streams=numbers(streams, "--streams"),
        expert_hosts=expert_hosts,
        output_tokens=output_tokens,
        full=full,
        faults=faults,
        seed=seed,
    )
    _run(run_cluster, options, PLOT, json_output, plot)


@bench_app.command()
def trunks(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A directory, a repo id, or `demo`.", show_default="a small random one"),
    ] = None,
    count: Annotated[int, typer.Option("--trunks", min=2, help="Against one.")] = 2,
    streams: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    output_tokens: OutputTokens = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Answers of each stream.")] = 3,
    conversations: Annotated[int, typer.Option(min=1, help="At once.")] = 12,
    turns: Annotated[int, typer.Option(min=2, help="Of each conversation.")] = 5,
    seed: Seed = 0,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Serve with one trunk and with several on the same experts: rows per expert batch, and prefixes found again."""
    from moe_ray.bench.lab.trunks import PLOT, TrunksOptions, run_trunks
    from moe_ray.bench.report import check_plot

    check_plot(plot)
    options = TrunksOptions(
        model=model,
        trunks=count,
        streams=streams,
        output_tokens=output_tokens,
        rounds=rounds,
        conversations=conversations,
        turns=turns,
        seed=seed,
    )
    _run(run_trunks, options, PLOT, json_output, plot)


@bench_app.command()
def skew(
    experts: Annotated[int, typer.Option(help="Emulated experts.")] = 8,
    replicas: Annotated[int, typer.Option(help="Of all experts together: cards that the autoscaler may use.")] = 24,
    max_over_mean: Annotated[float, typer.Option("--skew", help="Rows of the hottest expert over the mean.")] = 2.3,
    shifts: Annotated[int, typer.Option(min=1, help="How often the hot spot moves.")] = 1,
    trunks: Annotated[int, typer.Option(min=1, help="Each with a pool of its own.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=1, help="That take turns in each trunk.")] = 3,
    start_delay: Annotated[float, typer.Option(help="Seconds until a new replica is there.")] = 2.0,
    seconds: Annotated[float, typer.Option(min=1.0, help="Measured per case.")] = 8.0,
    simulation: Annotated[bool, typer.Option(help="Simulate 64 experts and 32 trunks too.")] = True,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Run pool and autoscaler against a hot expert that moves and replicas that stall; computing is emulated."""
    from moe_ray.bench.lab.simulate import SimulationOptions
    from moe_ray.bench.lab.skew import PLOT, SkewOptions, curves, run_skew
    from moe_ray.bench.report import check_plot

    check_plot(plot)
    options = SkewOptions(
        num_experts=experts,
        replicas=replicas,
        skew=max_over_mean,
        shifts=shifts,
        trunks=trunks,
        micro_batches=micro_batches,
        start_delay_s=start_delay,
        measure_s=seconds,
        simulation=SimulationOptions() if simulation else None,
    )
    _run(run_skew, options, PLOT, json_output, plot, curves)


def _run(
    bench: Callable[[Options, Progress], Report],
    options: Options,
    axes: Plot,
    json_output: bool,
    plot: Path | None,
    curves: Callable[[Report], Report] | None = None,
) -> None:
    """Run one bench under progress bars and publish what it measured."""
    from moe_ray.bench.report import publish
    from moe_ray.console import loading_bars

    with loading_bars(console) as progress:
        report = bench(options, progress)
    publish(report, json_output=json_output, plot=plot, axes=axes, console=console, curves=curves)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _json_object(text: str, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag}: expected a JSON object, got {text!r}")
    return value
