"""What `moe-ray plan` and the start of `moe-ray serve` print."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import yaml
from rich.console import Console
from rich.table import Table

from moe_ray.config import Config
from moe_ray.config.number_sets import ALL, format_runs
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.balance import Proposal, Rows, parse_load, propose
from moe_ray.experts.planning.footprint import Network, Plan, key_parameters, make_plan, network_step
from moe_ray.experts.planning.placement import holdings
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.foreign import INDEX, PICKLES
from moe_ray.model.formats import dtype_bytes
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.surplus import check_surplus, config_of_trunk
from moe_ray.model.weights import weights_of_expert, weights_of_trunk

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and what each actor will read from the checkpoint (empty when only config.json is there)."""

    model_name: str
    directory: Path
    model: ModelConfig
    plan: Plan
    bytes_to_read: dict[str, int]
    experts_per_actor: int = 1


def planned(config: Config, directory: Path, without_weights: bool = False) -> Planned:
    """Plan the model of `directory`, checking every tensor's header. Raises `CheckpointError`, `ConfigError`.

    `without_weights`: a directory with no more than its config.json will do. Experts inside the trunk
    (`transport: local`) are planned one by one.
    """
    from moe_ray.model.compute.resolve import choose_dtype
    from moe_ray.native import build

    model = ModelConfig.load(directory)
    layers, experts = model.num_hidden_layers, model.num_local_experts
    spares, per_actor = config.experts.spare_keys(layers, experts), config.experts.experts_per_actor
    if config.transport == "local":
        spares, per_actor = (), 1
    placed = holdings(layers, experts, per_actor, spares)
    bytes_to_read: dict[str, int] = {}
    weights = any(any(directory.glob(pattern)) for pattern in ("*.safetensors", INDEX, *PICKLES))
    if weights or not without_weights:
        checkpoint = Checkpoint.open(directory)
        check_surplus(checkpoint)
        model = config_of_trunk(checkpoint)
        bytes_to_read["Trunk"] = checkpoint.check(weights_of_trunk(model))
        for held in placed:
            bytes_to_read[held.name] = checkpoint.check(
                weight for layer, expert in sorted(held.keys) for weight in weights_of_expert(model, layer, expert)
            )
        checkpoint.close()
    device = "cuda" if config.model.device == "cuda" else "cpu"
    dtype = choose_dtype(config.model.dtype, model.dtype, device, build.cpu_flags())
    plan = make_plan(model, dtype, placed)
    return Planned(config.served_name, directory, model, plan, bytes_to_read, per_actor)


@dataclass(frozen=True, slots=True)
class Balanced:
    """Recorded load, and what to replicate because of it."""

    rows: Rows
    proposal: Proposal
    layers_per_spare: int | None
    """None: whole experts are replicated."""


def balanced(planned: Planned, load: Path, extra_replicas: int | None, layers_per_spare: int | None) -> Balanced:
    """Propose replicas for the load recorded in the file `load`. Raises `ConfigError` naming the file."""
    try:
        text = load.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--load {load}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    rows = parse_load(text, f"--load {load}")
    layers, experts = planned.model.num_hidden_layers, planned.model.num_local_experts
    if (len(rows), len(rows[0])) != (layers, experts):
        raise ConfigError(
            f"--load {load}: {len(rows)} layers of {len(rows[0])} experts, "
            f"and {planned.model_name} has {layers} of {experts}"
        )
    return Balanced(rows, propose(rows, extra_replicas, layers_per_spare, planned.experts_per_actor), layers_per_spare)


def print_plan(console: Console, planned: Planned, gpu_gib: float | None) -> None:
    """Print the plan as a table; with `gpu_gib`, what fits cards of that size."""
    model, plan = planned.model, planned.plan
    console.print(
        f"[bold]{planned.model_name}[/]  {plan.total_parameters / 1e9:.2f} B parameters, "
        f"{model.num_hidden_layers} layers, {model.num_local_experts} experts, top {model.num_experts_per_tok}, "
        f"{plan.dtype}, {_size(plan.total_bytes)} in all"
    )
    console.print(str(planned.directory), style="dim", markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("actor", "parameters", "weights", "reads from disk"):
        table.add_column(column, justify="left" if column == "actor" else "right")
    if gpu_gib is not None:
        table.add_column(f"on {gpu_gib:g} GiB", justify="right")
    fits = plan.fits(int(gpu_gib * GIB)) if gpu_gib is not None else []
    for i, actor in enumerate(plan.actors):
        reads = planned.bytes_to_read.get(actor.name)
        row = [
            actor.name,
            f"{actor.parameters / 1e6:,.1f} M",
            _size(actor.weight_bytes),
            "-" if reads is None else _size(reads),
        ]
        if fits:
            _, ok, tokens = fits[i]
            row.append(("fits" + (f", {tokens:,} KV tokens" if tokens else "")) if ok else "does not fit")
        table.add_row(*row)
    console.print(table)
    console.print(
        f"KV cache: {plan.kv_bytes_per_token:,} B a token, {_size(plan.kv_bytes_per_token * plan.context)} "
        f"for one sequence of {plan.context:,} tokens"
    )


def print_balance(console: Console, planned: Planned, balanced: Balanced) -> None:
    """Print the load of each expert, the further replicas proposed, and max/mean before and after."""
    rows, proposal = balanced.rows, balanced.proposal
    loads = [sum(column) for column in zip(*rows, strict=True)]
    mean = sum(loads) / len(loads)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("expert", "rows", "of the mean", "replicas"):
        table.add_column(column, justify="left" if column == "expert" else "right")
    for expert, load in enumerate(loads):
        counts = [proposal.replicas((layer, expert)) for layer in range(len(rows))]
        few, many = min(counts), max(counts)
        copies = f"{few}" if few == many else f"{few} to {many}"
        table.add_row(f"Expert{expert}", f"{load:,.0f}", f"{load / mean:.2f}", copies)
    console.print("\n[bold]recorded load[/]")
    console.print(table)
    console.print(
        f"max/mean {proposal.before.total:.2f} (worst layer {max(proposal.before.per_layer):.2f}); with "
        f"{_more(balanced)} {proposal.after.total:.2f} (worst layer {max(proposal.after.per_layer):.2f})"
    )
    for number, entry in enumerate(_extras(planned, balanced), 1):
        keys = ", ".join(f"{name} layers {format_runs(layers)}" for name, layers in entry["layers"].items())
        console.print(f"  {number}. {keys or 'nothing'}: {_size(entry['weight_bytes'])}")
    if (settings := proposed_config(planned, balanced)) != {}:
        console.print("\n[bold]in the configuration file[/]")
        text = yaml.safe_dump(settings, default_flow_style=None, sort_keys=False)
        console.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)


def proposed_config(planned: Planned, balanced: Balanced) -> dict[str, Any]:
    """The proposal as keys of the configuration; {} where it is to change nothing.

    Replicas of whole experts are numbers of replicas where each has an actor of its own, else spares.
    """
    model, proposal = planned.model, balanced.proposal
    if balanced.layers_per_spare is None and planned.experts_per_actor == 1:
        counts = {expert: proposal.replicas((0, expert)) for expert in range(model.num_local_experts)}
        overrides = {expert: {"num_replicas": count} for expert, count in counts.items() if count > 1}
        return {"experts": {"overrides": overrides}} if overrides else {}
    spares = []
    for keys in filter(None, proposal.extras):
        layers: dict[int, list[int]] = {}
        for layer, expert in sorted(keys, key=lambda key: (key[1], key[0])):
            layers.setdefault(expert, []).append(layer)
        whole = model.num_hidden_layers
        spares.append({"experts": {e: ALL if len(held) == whole else format_runs(held) for e, held in layers.items()}})
    return {"experts": {"spares": spares}} if spares else {}


@dataclass(frozen=True, slots=True)
class Distance:
    """A network between trunk and experts, and how many streams use it at once."""

    network: Network
    streams: tuple[int, ...]
    compute_ms: float | None = None
    """Of a step; None: nobody has measured it."""

    def rows(self, planned: Planned) -> list[dict[str, float]]:
        """What each number of streams decodes at most, by `footprint.network_step`; zeros where nothing bounds."""
        steps = [network_step(planned.model, planned.plan.dtype, self.network, count) for count in self.streams]
        return [
            {
                "streams": step.tokens,
                "bytes_out": step.bytes_out,
                "bytes_in": step.bytes_in,
                "latency_ms": step.latency_ms,
                "transfer_ms": step.transfer_ms,
                "network_ms": step.network_ms,
                "tokens_per_s_bound": _finite(step.tokens_per_s()),
                **({} if self.compute_ms is None else {"tokens_per_s": _finite(step.tokens_per_s(self.compute_ms))}),
            }
            for step in steps
        ]


def _finite(rate: float) -> float:
    """0 for no bound at all, for which JSON has no word."""
    return rate if math.isfinite(rate) else 0.0


def print_distance(console: Console, planned: Planned, distance: Distance) -> None:
    """Print what a network adds to a decoding step and leaves of tokens/s, a line per number of streams."""
    network, compute = distance.network, distance.compute_ms
    speed = "no bound on bandwidth" if network.gbit is None else f"{network.gbit:g} Gbit/s at the trunk"
    layers = planned.model.num_hidden_layers
    console.print(f"\n[bold]network[/]  {network.latency_ms:g} ms one way, {speed}; {layers} round trips a step")
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ["streams", "out a step", "in", "latency ms", "transfer ms", "network ms", "tokens/s at most"]
    for column in columns + ([] if compute is None else [f"with {compute:g} ms computing"]):
        table.add_column(column, justify="right")
    for row in distance.rows(planned):
        spent = (f"{row[name]:.2f}" for name in ("latency_ms", "transfer_ms", "network_ms"))
        rates = (row[name] for name in ("tokens_per_s_bound", "tokens_per_s") if name in row)
        sizes = (_size(int(row[name])) for name in ("bytes_out", "bytes_in"))
        table.add_row(f"{row['streams']}", *sizes, *spent, *(f"{rate:,.0f}" if rate else "-" for rate in rates))
    console.print(table)
    console.print("experts on other hosts than the trunk; nothing overlaps, one round trip a call", style="dim")


def plan_json(
    planned: Planned, gpu_gib: float | None, balanced: Balanced | None = None, distance: Distance | None = None
) -> str:
    """The plan as one JSON object; with `balanced`, what to replicate under "balance"; `distance` under "network"."""
    plan = planned.plan
    fits = {a.name: ok for a, ok, _ in plan.fits(int(gpu_gib * GIB))} if gpu_gib is not None else {}
    rows = [
        {
            "actor": actor.name,
            "parameters": actor.parameters,
            "weight_bytes": actor.weight_bytes,
            "read_bytes": planned.bytes_to_read.get(actor.name),
            **({"fits": fits[actor.name]} if fits else {}),
        }
        for actor in plan.actors
    ]
    return json.dumps(
        {
            "model": planned.model_name,
            "dtype": plan.dtype,
            "total_weight_bytes": plan.total_bytes,
            "kv_bytes_per_token": plan.kv_bytes_per_token,
            "context": plan.context,
            "rows": rows,
            **({} if balanced is None else {"balance": _balance(planned, balanced)}),
            **({} if distance is None else {"network": _distance(planned, distance)}),
        },
        indent=1,
    )


def _distance(planned: Planned, distance: Distance) -> dict[str, object]:
    return {**asdict(distance.network), "compute_ms": distance.compute_ms, "rows": distance.rows(planned)}


def _balance(planned: Planned, balanced: Balanced) -> dict[str, object]:
    before, after = balanced.proposal.before, balanced.proposal.after
    return {
        "layers_per_spare": balanced.layers_per_spare,
        "extra_replicas": len(balanced.proposal.extras),
        "max_over_mean_before": before.total,
        "max_over_mean_after": after.total,
        "max_over_mean_per_layer_before": before.per_layer,
        "max_over_mean_per_layer_after": after.per_layer,
        "extras": _extras(planned, balanced),
        "config": proposed_config(planned, balanced),
    }


class _Extra(TypedDict):
    layers: dict[str, list[int]]
    weight_bytes: int


def _extras(planned: Planned, balanced: Balanced) -> list[_Extra]:
    """Each further replica: the layers that it holds, by expert, and their bytes."""
    of_layer = key_parameters(planned.model) * dtype_bytes(planned.plan.dtype)
    found: list[_Extra] = []
    for keys in balanced.proposal.extras:
        layers: dict[str, list[int]] = {}
        for expert, layer in sorted((expert, layer) for layer, expert in keys):
            layers.setdefault(f"Expert{expert}", []).append(layer)
        found.append({"layers": layers, "weight_bytes": of_layer * len(keys)})
    return found


def _more(balanced: Balanced) -> str:
    count, spare = len(balanced.proposal.extras), balanced.layers_per_spare
    what = "replica" if spare is None else f"spare of {spare} layers"
    if count == 1:
        return f"1 more {what}"
    return f"{count} more " + ("replicas" if spare is None else f"spares of {spare} layers")


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
