"""What `moe-ray plan` and the start of `moe-ray serve` print."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from moe_ray.commands.balance_report import Balanced, balance_json
from moe_ray.commands.network_report import Distance, network_json
from moe_ray.commands.planned import GIB, Planned, size


def print_plan(console: Console, planned: Planned, gpu_gib: float | None) -> None:
    """Print the plan as a table; with `gpu_gib`, what fits cards of that size."""
    model, plan = planned.model, planned.plan
    console.print(
        f"[bold]{planned.model_name}[/]  {plan.total_parameters / 1e9:.2f} B parameters, "
        f"{model.num_hidden_layers} layers, {model.num_local_experts} experts, top {model.num_experts_per_tok}, "
        f"{plan.dtype}, {size(plan.total_bytes)} in all"
    )
    console.print(str(planned.directory), style="dim", markup=False, soft_wrap=True)
    if gpu_gib is not None:
        console.print(f"on cards, in {plan.dtype}; this machine's CPU does not count", style="dim")
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
            size(actor.weight_bytes),
            "-" if reads is None else size(reads),
        ]
        if fits:
            _, ok, tokens = fits[i]
            row.append(("fits" + (f", {tokens:,} KV tokens" if tokens else "")) if ok else "does not fit")
        table.add_row(*row)
    console.print(table)
    console.print(
        f"KV cache: {plan.kv_bytes_per_token:,} B a token, {size(plan.kv_bytes_per_token * plan.context)} "
        f"for one sequence of {plan.context:,} tokens"
    )


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
            **({} if balanced is None else {"balance": balance_json(planned, balanced)}),
            **({} if distance is None else {"network": network_json(planned, distance)}),
        },
        indent=1,
    )
