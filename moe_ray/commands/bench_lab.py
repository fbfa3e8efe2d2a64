"""`moe-ray bench …`: experiments with servers of their own: kills, scaling, hosts, trunks, hot experts, plans."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_ray.commands.bench_options import (
    BenchModel,
    Concurrency,
    DecodedTokens,
    JsonOutput,
    OutputTokens,
    PlotFile,
    PromptTokens,
    Repeats,
    Seed,
    SmallModel,
    Streams,
    WideModel,
    run_bench,
)
from moe_ray.commands.options import names, numbers


def chaos(
    model: SmallModel = None,
    kills: Annotated[int, typer.Option(min=0, help="Of expert replicas, where each expert has two.")] = 50,
    single_kills: Annotated[int, typer.Option(min=0, help="Of experts that have one replica.")] = 10,
    trunk_kills: Annotated[int, typer.Option(min=0, help="Of two trunks.")] = 10,
    streams: Streams = 16,
    output_tokens: OutputTokens = 96,
    seed: Annotated[int, typer.Option(help="Of the prompts and the victims.")] = 0,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Kill experts and trunks of a server under load, and compare every answer with an undisturbed one."""
    from moe_ray.bench.lab.chaos import PLOT, ChaosOptions, run_chaos

    options = ChaosOptions(
        model=model,
        kills=kills,
        single_kills=single_kills,
        trunk_kills=trunk_kills,
        streams=streams,
        output_tokens=output_tokens,
        seed=seed,
    )
    run_bench(run_chaos, options, PLOT, json_output, plot)


def scale(
    model: SmallModel = None,
    expert: Annotated[int, typer.Option(min=0, help="That is scaled.")] = 3,
    cycles: Annotated[int, typer.Option(min=1, help="Each: unchanged, a second replica, one again.")] = 5,
    streams: Streams = 4,
    output_tokens: OutputTokens = 96,
    window: Annotated[float, typer.Option(min=1.0, help="Seconds that each phase is measured.")] = 8.0,
    seed: Seed = 0,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Give an expert a second replica under load and take it away again: what do running streams notice?"""
    from moe_ray.bench.lab.scale import PLOT, ScaleOptions, run_scale

    options = ScaleOptions(
        model=model,
        expert=expert,
        cycles=cycles,
        streams=streams,
        output_tokens=output_tokens,
        window_s=window,
        seed=seed,
    )
    run_bench(run_scale, options, PLOT, json_output, plot)


def cluster(
    model: WideModel = None,
    carriers: Annotated[str, typer.Option(help="Which of socket, grpc, ray.")] = "socket,grpc,ray",
    streams: Annotated[str, typer.Option(help="Requests in flight: a list of numbers.")] = "1,8",
    expert_hosts: Annotated[int, typer.Option(min=2, max=16, help="Beside the trunk's.")] = 2,
    output_tokens: DecodedTokens = 24,
    full: Annotated[bool, typer.Option("--full", help="1, 10, 25 Gbit/s by 0.1, 0.5, 5 ms, for each carrier.")] = False,
    faults: Annotated[bool, typer.Option(help="Cut off and kill an expert host under load, too.")] = True,
    seed: Seed = 0,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Serve from several hosts (network namespaces; needs root) over networks of several speeds, against the plan."""
    from moe_ray.bench.lab.cluster import PLOT, ClusterOptions, run_cluster

    options = ClusterOptions(
        model=model,
        carriers=names(carriers),
        streams=numbers(streams, "--streams"),
        expert_hosts=expert_hosts,
        output_tokens=output_tokens,
        full=full,
        faults=faults,
        seed=seed,
    )
    run_bench(run_cluster, options, PLOT, json_output, plot)


def trunks(
    model: SmallModel = None,
    count: Annotated[int, typer.Option("--trunks", min=2, help="Against one.")] = 2,
    streams: Streams = 16,
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
    run_bench(run_trunks, options, PLOT, json_output, plot)


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
    run_bench(run_skew, options, PLOT, json_output, plot, curves)


def plan(
    model: BenchModel = None,
    parts: Annotated[
        str, typer.Option(help="Which of engine, emulated (experts that sleep), networks (needs root).")
    ] = "engine,emulated,networks",
    formats: Annotated[str, typer.Option(help="Of the engine's weights: which of float, int8, int4, nf4.")] = (
        "float,int8,int4"
    ),
    concurrency: Concurrency = "1,8,32",
    prompt_tokens: PromptTokens = 128,
    output_tokens: DecodedTokens = 96,
    repeats: Repeats = 3,
    seconds: Annotated[float, typer.Option(min=1.0, help="Measured per emulated placement.")] = 5.0,
    probe_again: Annotated[
        bool, typer.Option(help="Measure this CPU anew first, instead of what `moe-ray plan --fleet here` keeps.")
    ] = True,
    json_output: JsonOutput = False,
    plot: PlotFile = None,
) -> None:
    """Compare what `moe-ray plan --fleet` predicts of placements with what they take on this machine."""
    from moe_ray.bench.lab.plan_validation import PLOT, PlanBenchOptions, run_plan_bench

    options = PlanBenchOptions(
        model=model,
        parts=names(parts),
        formats=names(formats),
        concurrency=numbers(concurrency, "--concurrency"),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        seconds=seconds,
        probe_again=probe_again,
    )
    run_bench(run_plan_bench, options, PLOT, json_output, plot)
