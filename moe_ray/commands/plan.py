"""`moe-ray plan`: what a model would need, before anything starts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_ray.commands.completion import models
from moe_ray.commands.options import (
    ConfigFile,
    CpuOffload,
    DraftModel,
    Dtype,
    HfOverrides,
    JsonOutput,
    KvCacheDtype,
    Quantize,
    QuantizeTrunk,
    Variant,
    error_console,
    numbers,
    output_console,
)
from moe_ray.errors import ConfigError

if TYPE_CHECKING:
    from moe_ray.commands.network_report import Distance
    from moe_ray.experts.planning.network_step import Network
    from moe_ray.experts.planning.search import PlanFor


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
    cpu_offload_gib: CpuOffload = None,
    hf_overrides: HfOverrides = None,
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
    variant: Variant = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Gbit/s of the trunk's link to experts on other hosts: says what that leaves.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(min=0, help="Milliseconds one way to experts on other hosts.")
    ] = None,
    streams: Annotated[
        str | None,
        typer.Option(help="With those, or --fleet: sequences at once, a list of numbers.", show_default="1,8,32"),
    ] = None,
    step_ms: Annotated[
        float | None, typer.Option(min=0, help="With those: milliseconds that a step computes, as measured.")
    ] = None,
    fleet: Annotated[
        str | None,
        typer.Option(
            help='Machines to place it on: a YAML file, "8x T4-16GB, 1x L4@0.80, 4x cpu:16" (@: price an hour), or '
            "`here`: this CPU, as measured."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="With --fleet: tokens that each sequence holds.", show_default="1024, or the model's"),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="With --fleet: of the prompt whose first token is timed.", show_default="512"),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="With --fleet: tokens, latency or cost.", show_default="tokens")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="With --fleet: what to try of float, int8, int4, nf4.", show_default="all, or as configured"),
    ] = None,
    probe_again: Annotated[
        bool, typer.Option("--probe-again", help="With --fleet here: measure this CPU anew (some minutes).")
    ] = False,
    json_output: JsonOutput = False,
) -> None:
    """Show what each actor would hold and read, and the KV cache, before anything starts; with --load, what to add.

    With --fleet: which placement on these machines is best, what it is predicted to do, and what to change.

    No weights are needed: of a Hugging Face repository only config.json is fetched.
    """
    from moe_ray.commands.adapter_option import named_variants
    from moe_ray.commands.advice_report import advice_json, print_advice
    from moe_ray.commands.advised import advised, machines_of
    from moe_ray.commands.balance_report import balanced, print_balance
    from moe_ray.commands.cache import with_usable_cache
    from moe_ray.commands.network_report import print_distance
    from moe_ray.commands.plan_report import plan_json, print_plan
    from moe_ray.commands.planned import planned
    from moe_ray.config import load_config
    from moe_ray.console import loading_bars
    from moe_ray.hub import resolve_config, resolve_model

    if load is None and (extra_replicas is not None or layers_per_spare is not None):
        raise ConfigError("--extra-replicas and --layers-per-spare go with --load")

    extra = (context, prompt_tokens, objective, formats, probe_again or None)
    if fleet is None and any(each is not None for each in extra):
        raise ConfigError("--context, --prompt-tokens, --objective, --formats and --probe-again go with --fleet")
    network = _network(bandwidth, latency)
    distance = None
    if fleet is None:
        distance = _distance(network, streams, step_ms)
    elif step_ms is not None:
        raise ConfigError("--step-ms does not go with --fleet, which predicts it")
    flags = {
        "model": {"path": model, "dtype": dtype, "hf_overrides": hf_overrides},
        "experts": {"quantize": quantize, "cpu_offload_gib": cpu_offload_gib},
        "trunk": {"quantize": quantize_trunk},
        "engine": {
            "kv_cache_dtype": kv_cache_dtype,
            "draft_model": draft_model,
            "speculative": draft_model and "auto",
        },
        "variants": named_variants(variant),
    }
    settings = with_usable_cache(load_config(flags, config), error_console())
    if fleet is not None and settings.variants:
        raise ConfigError("--fleet predicts what one model does: leave the variants out")
    with loading_bars(error_console()) as progress:
        # Experts of variants are compared by their bytes, so the weights have to be here.
        directory = (resolve_model if settings.variants else resolve_config)(settings, progress)
        machines = None if fleet is None else machines_of(fleet, network, settings, probe_again, progress)
        cards = gpu_memory is not None or (machines is not None and not any(each.measured for each in machines.devices))
        made = planned(settings, directory, True, cards, partial(progress, "comparing experts"))
    advice = None if load is None else balanced(made, load, extra_replicas, layers_per_spare)
    best = None
    if machines is not None:
        asked = _asked(made.plan.context, streams, context, prompt_tokens, objective)
        if advice is not None:
            asked = replace(asked, shares=tuple(sum(column) for column in zip(*advice.rows, strict=True)))
        best = advised(made, settings, machines, asked, formats)
    if json_output:
        print(plan_json(made, gpu_memory, advice, distance, None if best is None else advice_json(best)))
        return
    print_plan(output_console(), made, gpu_memory, for_cards=True)
    if advice is not None:
        print_balance(output_console(), made, advice)
    if distance is not None:
        print_distance(output_console(), made, distance)
    if best is not None:
        print_advice(output_console(), best)


def _network(gbit: float | None, latency_ms: float | None) -> Network | None:
    from moe_ray.experts.planning.network_step import Network

    if gbit is None and latency_ms is None:
        return None
    if gbit is not None and gbit <= 0:
        raise ConfigError(f"--bandwidth: must be above 0, got {gbit:g}")
    return Network(latency_ms or 0.0, gbit)


def _distance(network: Network | None, streams: str | None, step_ms: float | None) -> Distance | None:
    from moe_ray.commands.network_report import Distance

    if network is None:
        if streams is not None or step_ms is not None:
            raise ConfigError("--streams and --step-ms go with --bandwidth or --latency")
        return None
    return Distance(network, numbers(streams or "1,8,32", "--streams"), step_ms)


def _asked(
    longest: int, streams: str | None, context: int | None, prompt: int | None, objective: str | None
) -> PlanFor:
    from moe_ray.experts.planning.search import OBJECTIVES, PlanFor

    if objective is not None and objective not in OBJECTIVES:
        raise ConfigError(f"--objective: {objective!r} is none of {', '.join(OBJECTIVES)}")
    wanted: Any = objective or "tokens"
    at_once = tuple(sorted(numbers(streams or "1,8,32", "--streams")))
    return PlanFor(at_once, context or min(1024, longest), min(prompt or 512, longest), wanted)
