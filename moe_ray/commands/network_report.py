"""`moe-ray plan --bandwidth --latency`: what a network between trunk and experts adds to a step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from moe_ray.commands.planned import Planned, size
from moe_ray.experts.planning.network_step import Network, network_step


@dataclass(frozen=True, slots=True)
class Distance:
    """A network between trunk and experts, and how many streams use it at once."""

    network: Network
    streams: tuple[int, ...]
    compute_ms: float | None = None
    """Of a step; None: nobody has measured it."""

    def rows(self, planned: Planned) -> list[dict[str, float]]:
        """What each number of streams decodes at most, by `network_step.network_step`; zeros where nothing bounds."""
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
    layers = len(planned.model.mixture_layers)
    console.print(f"\n[bold]network[/]  {network.latency_ms:g} ms one way, {speed}; {layers} round trips a step")
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ["streams", "out a step", "in", "latency ms", "transfer ms", "network ms", "tokens/s at most"]
    for column in columns + ([] if compute is None else [f"with {compute:g} ms computing"]):
        table.add_column(column, justify="right")
    for row in distance.rows(planned):
        spent = (f"{row[name]:.2f}" for name in ("latency_ms", "transfer_ms", "network_ms"))
        rates = (row[name] for name in ("tokens_per_s_bound", "tokens_per_s") if name in row)
        sizes = (size(int(row[name])) for name in ("bytes_out", "bytes_in"))
        table.add_row(f"{row['streams']}", *sizes, *spent, *(f"{rate:,.0f}" if rate else "-" for rate in rates))
    console.print(table)
    console.print("experts on other hosts than the trunk; nothing overlaps, one round trip a call", style="dim")


def network_json(planned: Planned, distance: Distance) -> dict[str, object]:
    """The steps as JSON values."""
    return {**asdict(distance.network), "compute_ms": distance.compute_ms, "rows": distance.rows(planned)}
