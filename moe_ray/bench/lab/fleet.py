"""Emulated replicas that come and go, and trunks that call them as a model's layers do."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_ray.bench.child import Child
from moe_ray.bench.lab.emulate import TOP_K, ReplicaSample, ServiceTime
from moe_ray.core import ReplicaInfo
from moe_ray.errors import MoeRayError
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.replica_data import unpacked
from moe_ray.model.moe import Routed, group
from moe_ray.transport import connect
from moe_ray.transport.base import Link, LinkOptions

DRAIN_S = 5.0
"""A replica that was taken out of discovery listens for so long: more than two refreshes of a replica table."""


@dataclass(frozen=True, slots=True)
class FleetShape:
    """What the trunks and the experts agree on."""

    num_experts: int
    layers: int
    tokens: int
    """Of one step of one micro-batch."""
    hidden: int
    service: ServiceTime
    trunk_us: float = 0.0
    """What a trunk computes by itself before each layer's calls; asleep."""


@dataclass(slots=True)
class _Member:
    expert: int
    child: Child
    info: ReplicaInfo
    found_from: float


@dataclass(eq=False)
class Fleet:
    """The replicas, as Serve would see them: asked for, started after a delay, drained, stopped. Used by one thread."""

    children: list[Child]
    shape: FleetShape
    token: str
    start_delay_s: float = 0.0
    stalls: tuple[float, float] = (0.0, 0.0)
    """Seconds and share of calls, of every second replica of an expert."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """More that the children's `start` is told."""
    _members: dict[str, _Member] = field(default_factory=dict)
    _leaving: list[tuple[float, str, Child]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def discover(self) -> list[ReplicaInfo]:
        """Who has arrived. From any thread."""
        now = time.monotonic()
        with self._lock:
            return [member.info for member in self._members.values() if member.found_from <= now]

    def planned(self) -> dict[int, int]:
        """Replicas of each expert, those that are starting too."""
        counts = dict.fromkeys(range(self.shape.num_experts), 0)
        for member in self._members.values():
            counts[member.expert] += 1
        return counts

    def scale(self, wanted: Mapping[int, int], at_once: bool = False) -> bool:
        """Start and stop replicas until there are as many as `wanted`; whether anything changed."""
        changed = False
        for expert, count in wanted.items():
            mine = [name for name, member in self._members.items() if member.expert == expert]
            for index in range(len(mine), count):
                self._start(expert, index, 0.0 if at_once else self.start_delay_s)
                changed = True
            for name in mine[count:]:
                with self._lock:
                    member = self._members.pop(name)
                self._leaving.append((time.monotonic() + DRAIN_S, name, member.child))
                changed = True
        while self._leaving and self._leaving[0][0] <= time.monotonic():
            _, name, child = self._leaving.pop(0)
            child.ask("stop", names=[name])
        return changed

    def samples(self) -> dict[str, ReplicaSample]:
        """The counters of all replicas that are not leaving."""
        found: dict[str, ReplicaSample] = {}
        for child in self.children:
            for name, counters in child.ask("sample").items():
                if name in self._members:
                    found[name] = ReplicaSample(self._members[name].expert, **counters)
        return found

    def stop(self) -> None:
        """Stop all at once."""
        leaving = [(name, child) for _, name, child in self._leaving]
        leaving += [(name, member.child) for name, member in self._members.items()]
        with self._lock:
            self._members.clear()
        self._leaving.clear()
        for child in self.children:
            child.ask("stop", names=[name for name, its in leaving if its is child])

    def _start(self, expert: int, index: int, delay_s: float) -> None:
        number = next(self._numbers)
        child, service = self.children[number % len(self.children)], self.shape.service
        stall_s, stall_share = self.stalls if index % 2 else (0.0, 0.0)
        info = child.ask(
            "start",
            name=f"Expert{expert}-{number}",
            expert=expert,
            layers=self.shape.layers,
            token=self.token,
            service=[service.fixed_us, service.per_row_us],
            stall_s=stall_s,
            stall_share=stall_share,
            **self.settings,
        )
        with self._lock:
            member = _Member(expert, child, unpacked(info), time.monotonic() + delay_s)
            self._members[member.info.replica_id] = member


@dataclass(frozen=True, slots=True)
class Step:
    """One micro-batch that went through all layers."""

    ended: float
    took_s: float


class Trunks:
    """Threads that each drive a dispatcher and a directory of their own; micro-batches take turns, as in an engine."""

    def __init__(
        self,
        fleet: Fleet,
        count: int,
        micro_batches: int,
        weights: list[float],
        native_dir: Path,
        options: DispatchOptions,
    ) -> None:
        """Link to everybody. `weights`: how popular each expert is. `late_s`: by how much each sleep was too long."""
        self.weights, self.steps, self.late_s = weights, list[Step](), list[float]()
        self._shape, self._native_dir, self._token = fleet.shape, native_dir, fleet.token
        self._fleet, self._micro_batches = fleet, micro_batches
        self._ending = threading.Event()
        self.failure: MoeRayError | None = None
        self.dispatchers = [self._dispatcher(options) for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._run, args=(dispatcher, seed), name="bench-trunk", daemon=True)
            for seed, dispatcher in enumerate(self.dispatchers)
        ]

    def start(self) -> None:
        """Begin calling."""
        for dispatcher in self.dispatchers:
            dispatcher.table.refresh()
            dispatcher.table.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End and close every link. Raises what a trunk failed with."""
        self._ending.set()
        for thread in self._threads:
            thread.join(60)
        for dispatcher in self.dispatchers:
            dispatcher.close()
        if self.failure is not None:
            raise self.failure

    def linked(self) -> int:
        """The replicas that every trunk is linked to."""
        return min(len(dispatcher.table.replicas()) for dispatcher in self.dispatchers)

    def between(self, since: float, until: float) -> list[Step]:
        """The steps that ended then."""
        return [step for step in list(self.steps) if since <= step.ended < until]

    def _dispatcher(self, options: DispatchOptions) -> ExpertDispatcher:
        link = LinkOptions(token=self._token, native_dir=self._native_dir)

        def open_link(info: ReplicaInfo) -> Link:
            return connect("socket", info, link)

        keys = frozenset(itertools.product(range(self._shape.layers), range(self._shape.num_experts)))
        return ExpertDispatcher(ReplicaTable(self._fleet.discover, open_link, keys), options)

    def _run(self, dispatcher: ExpertDispatcher, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        turns = [self._micro_batch(dispatcher, draw) for _ in range(self._micro_batches)]
        try:
            while not self._ending.is_set():
                for turn in turns:
                    next(turn)
        except MoeRayError as error:
            self.failure = error
        finally:
            for turn in turns:
                turn.close()

    def _micro_batch(self, dispatcher: ExpertDispatcher, draw: torch.Generator) -> Generator[None]:
        hidden = torch.randn(self._shape.tokens, self._shape.hidden, generator=draw)
        while True:
            began = time.monotonic()
            for layer in range(self._shape.layers):
                if self._shape.trunk_us:
                    asleep = time.perf_counter()
                    time.sleep(self._shape.trunk_us / 1e6)
                    self.late_s.append(time.perf_counter() - asleep - self._shape.trunk_us / 1e6)
                pending = dispatcher.submit(layer, self._routed(hidden, draw))
                try:
                    yield
                    pending.gather()
                finally:
                    pending.abandon()
            ended = time.monotonic()
            self.steps.append(Step(ended, ended - began))

    def _routed(self, hidden: torch.Tensor, draw: torch.Generator) -> Routed:
        weights = torch.tensor(self.weights).expand(len(hidden), -1)
        chosen = torch.multinomial(weights, TOP_K, generator=draw).sort(dim=-1).values
        return group(hidden, chosen, torch.full(chosen.shape, 1 / TOP_K), self._shape.num_experts)
