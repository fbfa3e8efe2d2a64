"""`moe-ray plan`: what a model would need, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_ray.commands.completion import models
from moe_ray.commands.options import (
    ConfigFile,
    DraftModel,
    Dtype,
    JsonOutput,
    KvCacheDtype,
    Quantize,
    QuantizeTrunk,
    error_console,
    numbers,
    output_console,
)
from moe_ray.errors import ConfigError

if TYPE_CHECKING:
    from moe_ray.commands.network_report import Distance


def plan(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A directory, a config.json, a Hugging Face repo id, or `demo`.",
            autocompletion=models,
        ),
    ] = "demo",
    config: ConfigFile = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_trunk: QuantizeTrunk = None,
    kv_cache_dtype: KvCacheDtype = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Size of each card in GiB: says what fits.")] = None,
    load: Annotated[
        Path | None,
        typer.Option(help='Recorded load, from which to propose replicas: the JSON of GET /experts, or {"rows": ...}.'),
    ] = None,
    extra_replicas: Annotated[
        int | None,
        typer.Option(min=0, help="With --load: further replicas.", show_default="until max/mean is 1.1, at most 8"),
    ] = None,
    layers_per_spare: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --load: further replicas hold so many hot layers of any experts.",
            show_default="all of one expert",
        ),
    ] = None,
    draft_model: DraftModel = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Gbit/s of the trunk's link to experts on other hosts: says what that leaves.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(min=0, help="Milliseconds one way to experts on other hosts.")
    ] = None,
    streams: Annotated[
        str | None, typer.Option(help="With those: sequences at once, a list of numbers.", show_default="1,8,32")
    ] = None,
    step_ms: Annotated[
        float | None, typer.Option(min=0, help="With those: milliseconds that a step computes, as measured.")
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Show what each actor would hold and read, and the KV cache, before anything starts; with --load, what to add.

    No weights are needed: of a Hugging Face repository only config.json is fetched.
    """
    from moe_ray.commands.balance_report import balanced, print_balance
    from moe_ray.commands.cache import with_usable_cache
    from moe_ray.commands.network_report import print_distance
    from moe_ray.commands.plan_report import plan_json, print_plan
    from moe_ray.commands.planned import planned
    from moe_ray.config import load_config
    from moe_ray.console import loading_bars
    from moe_ray.hub import resolve_config

    if load is None and (extra_replicas is not None or layers_per_spare is not None):
        raise ConfigError("--extra-replicas and --layers-per-spare go with --load")

    distance = _distance(bandwidth, latency, streams, step_ms)
    flags = {
        "model": {"path": model, "dtype": dtype},
        "experts": {"quantize": quantize},
        "trunk": {"quantize": quantize_trunk},
        "engine": {
            "kv_cache_dtype": kv_cache_dtype,
            "draft_model": draft_model,
            "speculative": draft_model and "auto",
        },
    }
    settings = with_usable_cache(load_config(flags, config), error_console())
    with loading_bars(error_console()) as progress:
        directory = resolve_config(settings, progress)
    made = planned(settings, directory, without_weights=True, cards=gpu_memory is not None)
    advice = None if load is None else balanced(made, load, extra_replicas, layers_per_spare)
    if json_output:
        print(plan_json(made, gpu_memory, advice, distance))
        return
    print_plan(output_console(), made, gpu_memory, for_cards=True)
    if advice is not None:
        print_balance(output_console(), made, advice)
    if distance is not None:
        print_distance(output_console(), made, distance)


def _distance(
    gbit: float | None, latency_ms: float | None, streams: str | None, step_ms: float | None
) -> Distance | None:
    from moe_ray.commands.network_report import Distance
    from moe_ray.experts.planning.footprint import Network

    if gbit is None and latency_ms is None:
        if streams is not None or step_ms is not None:
            raise ConfigError("--streams and --step-ms go with --bandwidth or --latency")
        return None
    if gbit is not None and gbit <= 0:
        raise ConfigError(f"--bandwidth: must be above 0, got {gbit:g}")
    return Distance(Network(latency_ms or 0.0, gbit), numbers(streams or "1,8,32", "--streams"), step_ms)
