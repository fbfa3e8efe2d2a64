"""What `moe-ray plan --fleet` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from moe_ray.commands.advised import Advised
from moe_ray.experts.planning.advice import devices_said, parts_ms, placement_said
from moe_ray.experts.planning.search import Proposed


def print_advice(console: Console, advised: Advised) -> None:
    """Print the placements, the parts of a step of the best one, and the advice."""
    situation = advised.situation
    asked, machines = situation.asked, situation.machines
    every = devices_said(machines, range(len(machines.devices)))
    console.print(
        f"\n[bold]fleet[/]  {every}; {asked.context:,} tokens of context a sequence, first token of {asked.prompt:,}",
        soft_wrap=True,
    )
    priced = any(each.price_per_million(asked.streams[-1]) is not None for each in situation.found)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("placement", overflow="fold")
    table.add_column("format")
    columns = [f"tokens/s at {'/'.join(map(str, asked.streams))}", "first token ms", "KV tokens", "sequences"]
    for column in columns + (["per M tokens"] if priced else []):
        table.add_column(column, justify="right")
    for each in situation.found:
        rates = (each.steps.get(streams) for streams in asked.streams)
        row = [
            placement_said(machines, each.spread),
            each.form,
            " / ".join("-" if step is None else f"{step.tokens_per_s:,.0f}" for step in rates),
            f"{1e3 * each.first_token_s:,.0f}",
            f"{each.kv_tokens:,}",
            f"{each.most_streams(asked.context):,}",
        ]
        if priced:
            price = each.price_per_million(asked.streams[-1])
            row.append("-" if price is None else f"{price:.2f}")
        table.add_row(*row)
    console.print(table)
    _print_parts(console, situation.best)
    console.print("\n[bold]advice[/]")
    for sentence in advised.advice:
        console.print(f"- {sentence}", markup=False, soft_wrap=True)


def _print_parts(console: Console, best: Proposed) -> None:
    console.print("\nof the first placement, a step in ms; parts overlap where there are micro-batches", style="dim")
    table = Table(box=None, pad_edge=False, header_style="dim")
    names = ("sequences", "step", "trunk", "experts", "carrier", "network", "network's share", "micro-batches")
    for name in names:
        table.add_column(name, justify="right")
    for streams, step in best.steps.items():
        parts = (f"{value:.2f}" for value in parts_ms(step).values())
        table.add_row(
            f"{streams}", f"{1e3 * step.seconds:.2f}", *parts, f"{step.network_share:.0%}", f"{step.micro_batches}"
        )
    console.print(table)


def advice_json(advised: Advised) -> dict[str, object]:
    """All of it as JSON values."""
    situation = advised.situation
    return {
        "advice": advised.advice,
        "objective": situation.asked.objective,
        "context": situation.asked.context,
        "devices": [
            {
                "name": device.name,
                "host": device.host,
                "memory_bytes": device.memory_bytes,
                "measured": device.measured,
                "price_per_hour": device.price_per_hour,
            }
            for device in situation.machines.devices
        ],
        "placements": [_placement(advised, each) for each in situation.found],
    }


def _placement(advised: Advised, each: Proposed) -> dict[str, object]:
    asked, spread = advised.situation.asked, each.spread
    return {
        "what": placement_said(advised.situation.machines, spread),
        "format": each.form,
        "in_process": spread.in_process,
        "trunk_devices": list(spread.trunks),
        "expert_devices": [list(homes) for homes in spread.homes],
        "experts_per_actor": spread.per_actor,
        "trunk_bytes": each.cost.trunk_bytes,
        "expert_bytes": each.cost.expert_bytes,
        "kv_tokens": each.kv_tokens,
        "most_sequences": each.most_streams(asked.context),
        "first_token_ms": 1e3 * each.first_token_s,
        "price_per_hour": each.price_per_hour,
        "steps": [
            {
                "sequences": streams,
                "step_ms": 1e3 * step.seconds,
                "tokens_per_s": step.tokens_per_s,
                **parts_ms(step),
                "network_share": step.network_share,
                "expert_busy": step.expert_busy,
                "micro_batches": step.micro_batches,
                "price_per_million_tokens": each.price_per_million(streams),
            }
            for streams, step in each.steps.items()
        ],
    }
