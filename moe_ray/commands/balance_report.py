"""`moe-ray plan --load`: which replicas a recorded load asks for, printed, as JSON and as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import yaml
from rich.console import Console
from rich.table import Table

from moe_ray.commands.planned import Planned, size
from moe_ray.config.number_sets import ALL, format_runs
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.balance import Proposal, Rows, parse_load, propose
from moe_ray.experts.planning.footprint import weights_of_keys


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
        console.print(f"  {number}. {keys or 'nothing'}: {size(entry['weight_bytes'])}")
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


def balance_json(planned: Planned, balanced: Balanced) -> dict[str, object]:
    """The proposal as JSON values."""
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
    found: list[_Extra] = []
    for keys in balanced.proposal.extras:
        layers: dict[str, list[int]] = {}
        for expert, layer in sorted((expert, layer) for layer, expert in keys):
            layers.setdefault(f"Expert{expert}", []).append(layer)
        nbytes = sum(map(planned.held.nbytes, weights_of_keys(planned.model, keys)))
        found.append({"layers": layers, "weight_bytes": nbytes})
    return found


def _more(balanced: Balanced) -> str:
    count, spare = len(balanced.proposal.extras), balanced.layers_per_spare
    what = "replica" if spare is None else f"spare of {spare} layers"
    if count == 1:
        return f"1 more {what}"
    return f"{count} more " + ("replicas" if spare is None else f"spares of {spare} layers")
