"""`bench skew` without sockets: many experts and trunks as a discrete-event simulation over the same policy functions.

A trunk's layer ends when its last call does; calls wait at replicas in the order of arrival. Replicas are chosen by
`selection.select_replica` from what each trunk knows by itself, and scaled by `planning.autoscale.decide`.
Batches are not split, calls are not hedged, and the network takes no time.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moe_ray.bench.lab.emulate import (
    RESTORED,
    Autoscaler,
    ReplicaSample,
    ServiceQueue,
    ServiceTime,
    busy_shares,
    even,
    max_over_mean,
    percentile,
    popularity,
    restored_after_s,
    shifted,
)
from moe_ray.bench.report import Row
from moe_ray.config.experts import AutoscaleSection
from moe_ray.experts.client.replica import backlog_rows
from moe_ray.experts.client.selection import select_replica
from moe_ray.experts.planning.autoscale import AutoscaleOptions

PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """What is simulated, in simulated seconds."""

    num_experts: int = 64
    trunks: int = 32
    layers: int = 4
    tokens: int = 512
    service: ServiceTime = field(default_factory=lambda: ServiceTime(6000.0, 1500.0))
    skew: float = 2.3
    start_delay_s: float = 2.0
    window_s: float = AutoscaleSection().look_back_s
    scale: AutoscaleOptions = field(default_factory=lambda: AutoscaleOptions(max_total=192))
    settle_s: float = 60.0
    measure_s: float = 10.0


@dataclass(slots=True, eq=False)
class _Server:
    name: str
    expert: int
    found_from: float
    queue: ServiceQueue = field(default_factory=ServiceQueue)
    waited_s: float = 0.0
    """Of the calls that are done."""


@dataclass(slots=True, eq=False)
class _Seen:
    """A replica as one trunk sees it: `selection.Candidate`."""

    server: _Server
    outstanding_rows: int = 0
    calls: int = 0
    said: int = 0
    said_at: float = -1e9

    @property
    def replica_id(self) -> str:
        return self.server.name

    @property
    def node_id(self) -> str:
        return "node"

    @property
    def usable(self) -> bool:
        return True

    def trusted(self, now: float) -> bool:
        return True

    def backlog(self, now: float) -> int:
        return backlog_rows(self.outstanding_rows, self.said, now - self.said_at)

    def slowdown_at(self, now: float) -> float:
        return 1.0


class Simulation:
    """Trunks with one micro-batch each, and their experts' replicas. Deterministic."""

    def __init__(self, options: SimulationOptions, weights: list[float]) -> None:
        self._options, self.weights, self.now = options, weights, 0.0
        self._servers: dict[int, list[_Server]] = {expert: [] for expert in range(options.num_experts)}
        self._seen: list[dict[str, _Seen]] = [{} for _ in range(options.trunks)]
        self._tables: list[list[list[_Seen]]] = []
        """[trunk][expert] → the replicas that it may choose from."""
        self._flying: list[list[tuple[_Seen, int, float]]] = [[] for _ in range(options.trunks)]
        """[trunk] → (where a call went, its rows, how long it waits)"""
        self._at_layer, self._began = [0] * options.trunks, [0.0] * options.trunks
        self._events = [(0.0, trunk) for trunk in range(options.trunks)]
        self._numbers, self._random, self._draw = itertools.count(), np.random.default_rng(0), random.Random(0)
        self.steps: list[tuple[float, float]] = []
        """(when it ended, seconds that it took)"""

    def planned(self) -> dict[int, int]:
        return {expert: len(servers) for expert, servers in self._servers.items()}

    def scale(self, wanted: Mapping[int, int], delay_s: float) -> None:
        """Start and stop replicas; those that leave finish what they have."""
        for expert, count in wanted.items():
            servers = self._servers[expert]
            del servers[count:]
            while len(servers) < count:
                servers.append(_Server(f"{expert}-{next(self._numbers)}", expert, self.now + delay_s))

    def samples(self) -> dict[str, ReplicaSample]:
        return {
            s.name: ReplicaSample(s.expert, s.queue.computed_s(self.now), s.waited_s)
            for servers in self._servers.values()
            for s in servers
        }

    def run(self, until: float) -> None:
        """Let time pass. Replicas that have started by now are found now, as by a trunk's next look."""
        self._tables = [
            [
                [known.setdefault(s.name, _Seen(s)) for s in servers if s.found_from <= self.now]
                for servers in self._servers.values()
            ]
            for known in self._seen
        ]
        while self._events[0][0] < until:
            self.now, trunk = heapq.heappop(self._events)
            self._gather(trunk)
            heapq.heappush(self._events, (self._submit(trunk), trunk))
        self.now = until

    def _gather(self, trunk: int) -> None:
        per_row_s = self._options.service.per_row_us / 1e6
        for seen, rows, waited_s in self._flying[trunk]:
            seen.server.waited_s += waited_s
            seen.outstanding_rows -= rows
            seen.said, seen.said_at = int(seen.server.queue.left_s(self.now) / per_row_s), self.now
        if self._flying[trunk]:
            self._at_layer[trunk] += 1
        if self._at_layer[trunk] == self._options.layers:
            self.steps.append((self.now, self.now - self._began[trunk]))
            self._at_layer[trunk], self._began[trunk] = 0, self.now

    def _submit(self, trunk: int) -> float:
        """Send one layer; return when its last call is done."""
        options, flying, last = self._options, list[tuple[_Seen, int, float]](), self.now
        for expert, rows in enumerate(self._routed()):
            if not rows:
                continue
            seen = select_replica(self._tables[trunk][expert], rows, self.now, draw=self._draw)
            assert seen is not None, "every expert keeps a replica that has arrived"
            seen.outstanding_rows += rows
            seen.calls += 1
            flying.append((seen, rows, seen.server.queue.left_s(self.now)))
            last = max(last, seen.server.queue.take(self.now, options.service.seconds(rows)))
        self._flying[trunk] = flying
        return last

    def _routed(self) -> list[int]:
        """Rows of each expert in one layer: each token draws two different ones."""
        steps = np.cumsum(self.weights)
        first, second = (
            np.searchsorted(steps, draw) for draw in self._random.random((2, self._options.tokens)) * steps[-1]
        )
        while (same := first == second).any():
            second[same] = np.searchsorted(steps, self._random.random(int(same.sum())) * steps[-1])
        return np.bincount(np.concatenate([first, second]), minlength=len(steps)).tolist()


def simulate(options: SimulationOptions) -> list[Row]:
    """A row per case: one replica each, scaled, after the hot spot moved, and uniform routing on as many replicas."""
    weights, n = popularity(options.num_experts, options.skew), options.num_experts
    scaler = Autoscaler(options.scale, options.window_s, options.scale.max_total or n)
    skewed = Simulation(options, weights)
    skewed.scale(even(n, n), 0.0)
    rows = [_measured("static", skewed, options)]

    def scale(case: str, reference: float | None = None) -> Row:
        since = skewed.now
        while skewed.now < since + options.settle_s:
            skewed.run(skewed.now + PERIOD_S)
            skewed.scale(scaler.wanted(skewed.now, skewed.samples(), skewed.planned()), options.start_delay_s)
        row = _measured(case, skewed, options)
        rate = RESTORED * (reference or float(row["tokens_per_s"] or 0)) / options.tokens
        row["relief_s"] = restored_after_s([end for end, _ in skewed.steps], since, skewed.now, rate, 2.0)
        return row

    rows.append(scale("scaled"))
    skewed.weights = shifted(weights, n // 2)
    rows.append(scale("hot spot moved", float(rows[-1]["tokens_per_s"] or 0)))
    balanced = Simulation(options, [1.0] * n)
    balanced.scale(even(n, sum(skewed.planned().values())), 0.0)
    rows.append(_measured("balanced", balanced, options))
    return rows


def _measured(case: str, simulation: Simulation, options: SimulationOptions) -> Row:
    simulation.run(simulation.now + 2.0)
    since, before = simulation.now, simulation.samples()
    simulation.run(since + options.measure_s)
    took = [took for end, took in simulation.steps if since <= end]
    return {
        "case": case,
        "experts": options.num_experts,
        "trunks": options.trunks,
        "replicas": sum(simulation.planned().values()),
        "tokens_per_s": len(took) * options.tokens / options.measure_s,
        "max_over_mean_busy": max_over_mean(busy_shares(before, simulation.samples(), options.measure_s)),
        "step_p50_ms": 1e3 * percentile(took, 0.5),
        "step_p99_ms": 1e3 * percentile(took, 0.99),
        "relief_s": None,
    }
