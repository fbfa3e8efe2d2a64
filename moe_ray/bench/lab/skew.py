"""`bench skew`: what the pool, discovery and the autoscaler make of a hot expert, and of a replica that stalls.

All of it runs as in a trunk, over the socket carrier, but the experts' computing is emulated: their calls take a time
that is told, so that a machine with few cores can stand for many cards.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from moe_ray.bench.child import Child, children
from moe_ray.bench.lab.emulate import (
    Autoscaler,
    ServiceTime,
    even,
    popularity,
    row_shares,
    shifted,
)
from moe_ray.bench.lab.fleet import Fleet, FleetShape, Trunks
from moe_ray.bench.lab.simulate import SimulationOptions, simulate
from moe_ray.bench.lab.watched_run import WARM_S, WatchedRun
from moe_ray.bench.report import Plot, Report, Row, machine_facts
from moe_ray.config import load_config
from moe_ray.config.experts import AutoscaleSection
from moe_ray.console import Report as Progress
from moe_ray.errors import ConfigError
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.planning.autoscale import AutoscaleOptions

WINDOW_S = AutoscaleSection().look_back_s
"""What it looks back over."""
STALL_S, STALL_SHARE = 0.2, 0.01
QUICK = ServiceTime(1000.0, 50.0)
"""Of the experts whose stalls are hedged: a step of theirs is short against a stall."""
PLOT = Plot(x="at_s", y="tokens_per_s", series="run")


@dataclass(frozen=True, slots=True)
class SkewOptions:
    """What is run."""

    num_experts: int = 8
    replicas: int = 24
    """All experts together, once scaled: cards that there are."""
    trunks: int = 4
    micro_batches: int = 3
    layers: int = 4
    tokens: int = 64
    hidden: int = 32
    service: ServiceTime = field(default_factory=lambda: ServiceTime(6000.0, 1500.0))
    skew: float = 2.3
    """max/mean of the rows of experts."""
    shifts: int = 1
    """How often the hot spot moves."""
    start_delay_s: float = 2.0
    """From asking for a replica until discovery knows it."""
    up_after_s: float = AutoscaleSection().up_after_s
    down_after_s: float = 30.0
    settle_s: float = 30.0
    """Given to the autoscaler before what it has reached is measured."""
    measure_s: float = 8.0
    simulation: SimulationOptions | None = field(default_factory=SimulationOptions)
    native_dir: Path = field(default_factory=lambda: load_config().cache_dir)

    def check(self) -> None:
        """Raise `ConfigError` naming the option and what is allowed."""
        if self.num_experts < 2:
            raise ConfigError("--experts: must be at least 2")
        if self.replicas < self.num_experts:
            raise ConfigError(f"--replicas: must be at least one per expert ({self.num_experts})")
        if not 1.0 <= self.skew < self.num_experts / 2:
            raise ConfigError(f"--skew: must be at least 1 and below {self.num_experts / 2:g}, half of --experts")
        least = {"--trunks": self.trunks, "--micro-batches": self.micro_batches, "--shifts": self.shifts}
        if wrong := [name for name, number in least.items() if number < 1]:
            raise ConfigError(f"{', '.join(wrong)}: must be at least 1")
        if self.start_delay_s < 0 or self.measure_s <= 0:
            raise ConfigError("--start-delay and --seconds: must not be negative")

    @property
    def shape(self) -> FleetShape:
        return FleetShape(self.num_experts, self.layers, self.tokens, self.hidden, self.service)

    @property
    def scale(self) -> AutoscaleOptions:
        return AutoscaleOptions(
            up_after_s=self.up_after_s,
            down_after_s=self.down_after_s,
            max_total=self.replicas,
        )

    @property
    def weights(self) -> list[float]:
        """How popular the experts are, the first most."""
        return popularity(self.num_experts, self.skew)

    @property
    def seconds(self) -> float:
        """How long it takes, but for the simulation."""
        return (4 + self.shifts) * (WARM_S + self.measure_s) + (1 + self.shifts) * self.settle_s


def run_skew(options: SkewOptions, progress: Progress) -> Report:
    """Run every case; blocks, and leaves no process behind.

    Raises `ConfigError`, `ChildFailed` when a process does not do its part, and what the pool raises.
    """
    options.check()
    load, began = os.getloadavg()[0], time.monotonic()

    def tick(what: str, done: int, total: int) -> None:
        progress(what, min(int(time.monotonic() - began), int(options.seconds)), int(options.seconds))

    token = secrets.token_hex(16)
    with children() as start:
        hosts = [start("moe_ray.bench.lab.skew_process", f"emulated experts {i}") for i in range(2)]
        tick("emulated seconds", 0, 0)
        rows, curve = _skewed(options, hosts, token, tick)
        total = int(rows[-1]["replicas"] or 0)
        rows.append(_balanced(options, hosts, token, total, tick))
        rows += [_hedged(options, hosts, token, hedge, tick) for hedge in (False, True)]
        errors = [host.ask("error") for host in hosts]
    progress("emulated seconds", int(options.seconds), int(options.seconds))
    simulated = _simulated(options, progress)
    facts = {
        **machine_facts(),
        "load_average_before": round(load, 1),
        **_headline(rows),
        "max_over_mean_rows": options.num_experts * max(row_shares(options.weights)),
        "emulation_late_mean_us": sum(error["mean_us"] for error in errors) / len(errors),
        "emulation_late_p99_us": max(error["p99_us"] for error in errors),
        "fixed_us": options.service.fixed_us,
        "per_row_us": options.service.per_row_us,
        "trunks": options.trunks,
        "micro_batches": options.micro_batches,
        "layers": options.layers,
        "tokens_per_step": options.tokens,
        "start_delay_s": options.start_delay_s,
        "window_s": WINDOW_S,
    }
    return Report("skew", rows, facts, {"simulated": simulated} if simulated else {}, curve)


def curves(report: Report) -> Report:
    """Throughput over time, second by second."""
    return Report(report.bench, report.curve, report.facts)


def _skewed(options: SkewOptions, hosts: list[Child], token: str, tick: Progress) -> tuple[list[Row], list[Row]]:
    """One replica each, then the autoscaler, then a hot spot that moves."""
    fleet = Fleet(hosts, options.shape, token, options.start_delay_s)
    fleet.scale(even(options.num_experts, options.num_experts), at_once=True)
    trunks = Trunks(
        fleet, options.trunks, options.micro_batches, options.weights, options.native_dir, DispatchOptions()
    )
    run = WatchedRun("skewed", fleet, trunks, tick)
    scaler = Autoscaler(options.scale, WINDOW_S, options.replicas)
    trunks.start()
    try:
        run.link()
        started = time.monotonic()
        rows = [run.measure("static", options.measure_s)]
        since = time.monotonic()
        run.scale(scaler, options.settle_s)
        rows.append(run.measure("scaled", options.measure_s))
        rows[-1]["relief_s"] = run.relief_s(since, float(rows[-1]["tokens_per_s"] or 0))
        for shift in range(1, options.shifts + 1):
            trunks.weights = shifted(options.weights, shift * (options.num_experts // 2 + 1))
            since = time.monotonic()
            run.scale(scaler, options.settle_s)
            rows.append(run.measure(f"hot spot moved {shift}", options.measure_s))
            rows[-1]["relief_s"] = run.relief_s(since, float(rows[1]["tokens_per_s"] or 0))
        return rows, run.curve(started)
    finally:
        trunks.stop()
        fleet.stop()


def _balanced(options: SkewOptions, hosts: list[Child], token: str, total: int, tick: Progress) -> Row:
    """Uniform routing on `total` replicas."""
    fleet = Fleet(hosts, options.shape, token)
    fleet.scale(even(options.num_experts, total), at_once=True)
    alike = [1.0] * options.num_experts
    trunks = Trunks(fleet, options.trunks, options.micro_batches, alike, options.native_dir, DispatchOptions())
    run = WatchedRun("balanced", fleet, trunks, tick)
    trunks.start()
    try:
        run.link()
        return run.measure("balanced", options.measure_s)
    finally:
        trunks.stop()
        fleet.stop()


def _hedged(options: SkewOptions, hosts: list[Child], token: str, hedge: bool, tick: Progress) -> Row:
    """One trunk, one step at a time, two replicas of each expert, of which one stalls now and then."""
    shape = FleetShape(options.num_experts, options.layers, options.tokens, options.hidden, QUICK)
    fleet = Fleet(hosts, shape, token, stalls=(STALL_S, STALL_SHARE))
    fleet.scale(even(options.num_experts, 2 * options.num_experts), at_once=True)
    alike = [1.0] * options.num_experts
    trunks = Trunks(fleet, 1, 1, alike, options.native_dir, DispatchOptions(hedge=hedge))
    run = WatchedRun("stalls", fleet, trunks, tick)
    trunks.start()
    try:
        run.link()
        return run.measure("stalls, hedged" if hedge else "stalls", options.measure_s)
    finally:
        trunks.stop()
        fleet.stop()


def _simulated(options: SkewOptions, progress: Progress) -> list[Row]:
    if options.simulation is None:
        return []
    progress("simulation", 0, 1)
    rows = simulate(options.simulation)
    progress("simulation", 1, 1)
    return rows


def _headline(rows: list[Row]) -> dict[str, object]:
    """What the bench is about, under plain keys; `moved` is the case after the last move of the hot spot."""
    by_case = {str(row["case"]): row for row in rows}
    cases = {name: by_case[name] for name in ("balanced", "static", "scaled")}
    moved = [row for row in rows if str(row["case"]).startswith("hot spot")]
    cases["moved"], plain, hedged = moved[-1], by_case["stalls"], by_case["stalls, hedged"]
    facts: dict[str, object] = {}
    for name, row in cases.items():
        for key in ("tokens_per_s", "step_p50_ms", "step_p99_ms"):
            facts[f"{name}_{key}"] = row[key]
    reliefs = [row["relief_s"] for row in moved]
    balanced = max(1e-9, float(cases["balanced"]["tokens_per_s"] or 0))
    return {
        **facts,
        "scaled_over_balanced": float(cases["scaled"]["tokens_per_s"] or 0) / balanced,
        "moved_over_balanced": float(cases["moved"]["tokens_per_s"] or 0) / balanced,
        "max_over_mean_busy_before": cases["static"]["max_over_mean_busy"],
        "max_over_mean_busy_after": cases["scaled"]["max_over_mean_busy"],
        "max_over_mean_busy_moved": cases["moved"]["max_over_mean_busy"],
        "relief_s": None if None in reliefs else max(float(relief or 0) for relief in reliefs),
        "unhedged_step_p99_ms": plain["step_p99_ms"],
        "hedged_step_p99_ms": hedged["step_p99_ms"],
        "hedged_extra_calls_share": hedged["extra_calls_share"],
    }
