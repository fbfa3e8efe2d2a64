"""`bench transport`: what one scatter and gather costs on each carrier, against a bare socket."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moe_ray.bench.child import children, gather
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.config import load_config
from moe_ray.console import Report as Progress
from moe_ray.errors import ConfigError
from moe_ray.transport.handshake import ABSTRACT_UNIX

CARRIERS = ("raw", "socket", "grpc", "ray")
PATHS = ("unix", "tcp") if ABSTRACT_UNIX else ("tcp",)
"""What `raw` and `socket` choose from; `socket` takes the first wherever both ends share a machine."""
COMPARED = ((2, 8 * 1024), (8, 64 * 1024))
"""Fan-outs and sizes whose ratios are told: a single stream's and a batch's."""
WARMUP_ROUNDS = 50
PLOT = Plot(x="fan_out", y="p50_us", series="lane", log_x=True, log_y=True)


@dataclass(frozen=True, slots=True)
class TransportBenchOptions:
    """What is measured."""

    carriers: tuple[str, ...] = CARRIERS
    fan_out: tuple[int, ...] = (1, 2, 8)
    """Replicas that a round sends to, each a process."""
    message_bytes: tuple[int, ...] = (8 * 1024, 64 * 1024)
    """Rows sent to each replica, and as many come back."""
    rounds: int = 1000
    native_dir: Path = field(default_factory=lambda: load_config().cache_dir)
    """Where the native code of the socket carrier is kept."""

    def check(self) -> None:
        """Raise `ConfigError` naming the option and what is allowed."""
        unknown = [carrier for carrier in self.carriers if carrier not in CARRIERS]
        if unknown or not self.carriers:
            raise ConfigError(f"--carriers: {', '.join(unknown) or 'none'}; allowed: {', '.join(CARRIERS)}")
        if not self.fan_out or not all(1 <= count <= 64 for count in self.fan_out):
            raise ConfigError("--fan-out: must be numbers between 1 and 64")
        if not self.message_bytes or not all(_sendable(size) for size in self.message_bytes):
            raise ConfigError("--bytes: must be multiples of 8192, or even numbers below")
        if self.rounds < 1:
            raise ConfigError("--rounds: must be at least 1")


def run_transport(options: TransportBenchOptions, progress: Progress) -> Report:
    """Measure every carrier between the same processes in the same minute; blocks, and leaves no process behind.

    Raises `ConfigError` for options that cannot be measured, `ChildFailed` when a process does not do its part.
    """
    options.check()
    load = os.getloadavg()[0]
    token, rows = secrets.token_hex(16), list[Row]()
    lanes = list(_lanes(options.carriers))
    with children() as start:
        replicas = [start("moe_ray.bench.echo_process", f"Echo{i}") for i in range(max(options.fan_out))]
        trunk = start("moe_ray.bench.transport_process", "the sender")
        progress("processes", 0, 1)
        served = [carrier for carrier in ("socket", "grpc") if carrier in options.carriers]
        for replica in replicas:
            raw = PATHS if "raw" in options.carriers else ()
            replica.tell("open", carriers=served, raw=raw, token=token, native_dir=str(options.native_dir))
        addresses = gather(replicas)
        trunk.ask("open", progress, known=addresses, ray="ray" in options.carriers)
        progress("processes", 1, 1)
        points = list(itertools.product(options.fan_out, options.message_bytes))
        progress("rounds", 0, len(points))
        for done, (fan_out, size) in enumerate(points, 1):
            measured = trunk.ask(
                "measure",
                lanes=lanes,
                fan_out=fan_out,
                size=size,
                token=token,
                native_dir=str(options.native_dir),
                rounds=options.rounds,
                warmup=min(WARMUP_ROUNDS, options.rounds),
            )
            for (carrier, path), times in zip(lanes, measured["lanes"], strict=True):
                rows.append({"carrier": carrier, "path": path or None, "fan_out": fan_out, "bytes": size, **times})
            progress("rounds", done, len(points))
        trunk.close()  # before the replicas: a link that its trunk ends is no event
    rows.sort(key=lambda row: lanes.index((str(row["carrier"]), str(row["path"] or ""))))
    facts = {**machine_facts(), "load_average_before": round(load, 1), "rounds": options.rounds, **_ratios(rows)}
    return Report("transport", rows, facts)


def curves(report: Report) -> Report:
    """The rows of the path that `socket` takes here, with a `lane` for each carrier and size: one line of the plot."""
    rows: list[Row] = [
        {"lane": f"{row['carrier']} {int(row['bytes'] or 0) / 1024:g} KiB", **row}
        for row in report.rows
        if row["path"] in (None, PATHS[0])
    ]
    return Report(report.bench, rows, report.facts)


def _sendable(size: int) -> bool:
    return size > 0 and (size % 8192 == 0 if size > 8192 else size % 2 == 0)


def _lanes(carriers: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for carrier in CARRIERS:
        if carrier in carriers:
            yield from ((carrier, path) for path in (PATHS if carrier in ("raw", "socket") else ("",)))


def _ratios(rows: list[Row]) -> dict[str, object]:
    """How much slower one carrier's median is than the next faster one's, by the path that `socket` takes here."""
    medians = {
        (row["carrier"], row["fan_out"], row["bytes"]): float(row["p50_us"] or 0)
        for row in rows
        if row["path"] in (None, PATHS[0])
    }
    facts: dict[str, object] = {}
    for (slow, fast), (fan_out, size) in itertools.product((("socket", "raw"), ("grpc", "socket")), COMPARED):
        above, below = medians.get((slow, fan_out, size)), medians.get((fast, fan_out, size))
        if above and below:
            facts[f"{slow}_over_{fast}_{fan_out}x{size // 1024}KiB"] = round(above / below, 2)
    return facts
