"""Placements of `bench plan` whose experts' times are told: many experts, replicas, and networks between hosts.

Dispatcher, sockets and network are the real ones; experts sleep. What a scatter and gather takes by itself is measured
once, with experts that take no time and no network between, and is the only thing that is calibrated.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_ray.bench.child import Child, children
from moe_ray.bench.lab.emulate import TOP_K, ServiceTime, even
from moe_ray.bench.lab.fleet import Fleet, FleetShape, Trunks
from moe_ray.bench.lab.hosts import Hosts, hosts
from moe_ray.bench.lab.switch import LinkShape
from moe_ray.bench.report import Row
from moe_ray.bench.roofline import distinct_experts
from moe_ray.console import Report as Progress
from moe_ray.errors import NotReady
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.planning.machines import Device, Machines, Spread
from moe_ray.experts.planning.model_cost import NOTHING, Matrices, ModelCost
from moe_ray.experts.planning.network_step import Network
from moe_ray.experts.planning.rates import Overhead, ToldRates
from moe_ray.experts.planning.step_time import StepTime, decode_step

LAYERS: Final = 4
FLOAT_BYTES: Final = 4
WARM_S: Final = 1.0
LINK_S: Final = 30.0
CALIBRATED: Final = ((8, 1), (8, 32), (32, 32))
"""Experts and tokens of the steps that are calibrated: few calls and rows, many rows, and many calls with as many."""


@dataclass(frozen=True, slots=True)
class EmulatedPlacement:
    """One placement of emulated experts."""

    experts: int
    tokens: int
    """Of each micro-batch."""
    service: ServiceTime
    replicas: int = 1
    """Of each expert."""
    micro_batches: int = 1
    trunk_us: float = 1000.0
    hidden: int = 64
    link: LinkShape | None = None
    """The network between trunk and experts; None: they are on one host."""

    @property
    def name(self) -> str:
        """As the report calls it."""
        parts = [
            f"{self.experts} emulated experts, {self.service.fixed_us:g} us + {self.service.per_row_us:g} us a row"
        ]
        if self.replicas > 1:
            parts.append(f"{self.replicas} replicas each")
        if self.micro_batches > 1:
            parts.append(f"{self.micro_batches} micro-batches")
        if self.link is not None:
            speed = "" if self.link.gbit is None else f", {self.link.gbit:g} Gbit/s"
            parts.append(f"{self.link.latency_ms:g} ms one way{speed}, rows of {self.hidden}")
        return "; ".join(parts)

    def predicted(self, carrier: Overhead, expert_late_us: float = 0.0, trunk_late_us: float = 0.0) -> StepTime:
        """What the cost model says of one micro-batch's way through all layers; `late`: what sleeps take beyond."""
        width = self.hidden * FLOAT_BYTES
        expert = Matrices("float32", 1, 1)
        cost = ModelCost(LAYERS, self.experts, TOP_K, NOTHING, NOTHING, expert, NOTHING, 1, 1, 1, width, 0, 0)
        trunk = Device("trunk", 0, 2**40, ToldRates(0.0, 0.0, self.trunk_us + trunk_late_us, carrier), is_cpu=True)
        replica = ToldRates(self.service.fixed_us + expert_late_us, self.service.per_row_us)
        host = 0 if self.link is None else 1
        devices = (trunk, *[Device("expert", host, 2**40, replica)] * (self.experts * self.replicas))
        homes = [
            tuple(1 + expert + copy * self.experts for copy in range(self.replicas)) for expert in range(self.experts)
        ]
        network = Network() if self.link is None else Network(self.link.latency_ms, self.link.gbit)
        sequences = self.tokens * self.micro_batches
        spread = Spread((0,), tuple(homes))
        return decode_step(cost, Machines(devices, network), spread, sequences, 1, micro_batches=self.micro_batches)


@dataclass(frozen=True, slots=True)
class Taken:
    """What one placement took, and by how much its sleeps were too long: the emulation's error, not the plan's."""

    steps_ms: list[float]
    expert_late_us: float
    """Mean of all calls."""
    trunk_late_us: float

    @property
    def step_ms(self) -> float:
        return statistics.median(self.steps_ms)


QUICK: Final = ServiceTime(2000.0, 100.0)
ROWS: Final = ServiceTime(1000.0, 400.0)
EMULATED: Final = (
    EmulatedPlacement(8, 8, QUICK),
    EmulatedPlacement(16, 32, QUICK),
    EmulatedPlacement(32, 32, QUICK),
    EmulatedPlacement(64, 32, QUICK),
    EmulatedPlacement(8, 32, ROWS),
    EmulatedPlacement(8, 32, ROWS, replicas=2),
    EmulatedPlacement(8, 8, QUICK, micro_batches=2, trunk_us=2000.0),
)
SHAPED: Final = (
    EmulatedPlacement(8, 8, QUICK, link=LinkShape(0.2)),
    EmulatedPlacement(8, 8, QUICK, link=LinkShape(1.0)),
    EmulatedPlacement(8, 8, QUICK, link=LinkShape(5.0)),
    EmulatedPlacement(8, 32, QUICK, hidden=4096, link=LinkShape(0.2, 10.0)),
    EmulatedPlacement(8, 32, QUICK, hidden=4096, link=LinkShape(0.2, 1.0)),
)


def emulated_rows(
    placements: Sequence[EmulatedPlacement], native: Path, seconds: float, progress: Progress
) -> list[Row]:
    """A row for each placement on one host; blocks."""
    token = secrets.token_hex(16)
    with children() as start:
        processes = [start("moe_ray.bench.lab.skew_process", f"emulated experts {i}") for i in range(2)]

        def measure(placement: EmulatedPlacement) -> Taken:
            return taken_by(placement, processes, token, native, seconds)

        return _rows(placements, measure, "emulated placements", progress)


def shaped_rows(placements: Sequence[EmulatedPlacement], native: Path, seconds: float, progress: Progress) -> list[Row]:
    """A row for each placement with experts on another host. Raises `ConfigError` where no namespace can be had."""
    token = secrets.token_hex(16)
    with hosts(2, native) as cluster, _on_second_host(cluster) as processes, cluster[0].inside():

        def measure(placement: EmulatedPlacement) -> Taken:
            cluster.switch.shape(placement.link or LinkShape())
            address = cluster[1].address
            return taken_by(placement, processes, token, native, seconds, address)

        return _rows(placements, measure, "networks", progress)


@contextmanager
def _on_second_host(cluster: Hosts) -> Iterator[list[Child]]:
    with children() as start:
        with cluster[1].inside():
            processes = [start("moe_ray.bench.lab.skew_process", f"emulated experts {i}") for i in range(2)]
        yield processes


def _rows(
    placements: Sequence[EmulatedPlacement],
    measure: Callable[[EmulatedPlacement], Taken],
    what: str,
    progress: Progress,
) -> list[Row]:
    """The carrier is calibrated for each width of rows before and after the placements: the machine's speed wanders."""
    widths = sorted({placement.hidden for placement in placements})

    def calibrate() -> dict[int, list[float]]:
        idle = ServiceTime(0.0, 0.0)
        return {
            width: [
                measure(EmulatedPlacement(experts, tokens, idle, trunk_us=0.0, hidden=width)).step_ms
                for experts, tokens in CALIBRATED
            ]
            for width in widths
        }

    before, found = calibrate(), list[Taken]()
    for done, placement in enumerate(placements):
        progress(what, done, len(placements))
        found.append(measure(placement))
    after = calibrate()
    progress(what, len(placements), len(placements))
    rows: list[Row] = []
    for placement, taken in zip(placements, found, strict=True):
        layer_s = [
            statistics.mean(pair) / LAYERS / 1e3
            for pair in zip(before[placement.hidden], after[placement.hidden], strict=True)
        ]
        carrier = carrier_overhead(layer_s)
        step = placement.predicted(carrier, taken.expert_late_us, taken.trunk_late_us)
        sequences = placement.tokens * placement.micro_batches
        rows.append(compared(placement.name, sequences, 1e3 * step.seconds, taken.step_ms))
    return rows


def carrier_overhead(layer_s: Sequence[float]) -> Overhead:
    """base + per_call * calls + per_row * rows through the seconds of a layer at `CALIBRATED`, none below 0."""
    reached = [distinct_experts(experts, TOP_K, tokens) for experts, tokens in CALIBRATED]
    few, rows = TOP_K * CALIBRATED[0][1], TOP_K * CALIBRATED[1][1]
    per_call = max(0.0, (layer_s[2] - layer_s[1]) / (reached[2] - reached[1]))
    per_row = max(0.0, (layer_s[1] - layer_s[0] - per_call * (reached[1] - reached[0])) / (rows - few))
    if not per_row:  # then the first and the last tell more of calls
        per_call = max(0.0, (layer_s[2] - layer_s[0]) / (reached[2] - reached[0]))
    base = max(0.0, layer_s[0] - per_call * reached[0] - per_row * few)
    return Overhead(1e6 * base, 1e6 * per_call, 1e6 * per_row)


def compared(name: str, sequences: int, predicted: float, measured: float) -> Row:
    """A row of the report: a step's milliseconds, as predicted and as measured."""
    return {
        "placement": name,
        "sequences": sequences,
        "predicted_ms": round(predicted, 2),
        "measured_ms": round(measured, 2),
        "error": round(predicted / measured - 1, 3),
        "tokens_per_s": round(1e3 * sequences / measured, 1),
    }


def taken_by(
    placement: EmulatedPlacement,
    processes: list[Child],
    token: str,
    native: Path,
    seconds: float,
    address: str | None = None,
) -> Taken:
    """Steps of one placement. `address`: of the host that the experts are on."""
    shape = FleetShape(
        placement.experts, LAYERS, placement.tokens, placement.hidden, placement.service, placement.trunk_us
    )
    settings = {} if address is None else {"host": address}
    fleet = Fleet(processes, shape, token, settings=settings)
    fleet.scale(even(placement.experts, placement.experts * placement.replicas), at_once=True)
    alike = [1.0] * placement.experts
    trunks = Trunks(fleet, 1, placement.micro_batches, alike, native, DispatchOptions(hedge=False))
    trunks.start()
    try:
        deadline = time.monotonic() + LINK_S
        while trunks.linked() < placement.experts * placement.replicas:
            if time.monotonic() > deadline:
                raise NotReady(f"bench plan: {placement.name}: the trunk does not find every replica")
            time.sleep(0.05)
        time.sleep(WARM_S)
        for child in processes:
            child.ask("error")
        began = time.monotonic()
        time.sleep(seconds)
        steps = trunks.between(began, time.monotonic())
        late = [child.ask("error")["mean_us"] for child in processes]
    finally:
        trunks.stop()
        fleet.stop()
    if not steps:
        raise NotReady(f"bench plan: {placement.name}: no step ended within {seconds:g} s")
    asleep = 1e6 * statistics.mean(trunks.late_s) if trunks.late_s else 0.0
    return Taken([1e3 * step.took_s for step in steps], statistics.mean(late), asleep)
