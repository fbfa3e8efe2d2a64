"""How long devices take for the calls of one layer, and how replicas share them. Pure functions of plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_ray.experts.client.selection import CALL_US, MIN_GAIN
from moe_ray.experts.planning.held_bytes import layer_copy_s
from moe_ray.experts.planning.machines import Machines, Spread
from moe_ray.experts.planning.model_cost import ModelCost
from moe_ray.experts.planning.rates import DeviceRates
from moe_ray.experts.planning.routing import Rows


@dataclass(frozen=True, slots=True)
class Copies:
    """What has to be copied to cards for calls, in seconds; of each expert, over all of its layers."""

    layer_s: tuple[float, ...]
    """Of a layer, those on the card with it."""
    often: tuple[float, ...]
    """In which share of the layers it is called."""

    @staticmethod
    def of(cost: ModelCost, spread: Spread, drawn: Sequence[Rows]) -> Copies | None:
        """For `drawn` layers; None where nothing is in the host's memory."""
        if not cost.offload:
            return None
        columns = zip(*drawn, strict=True)
        often = tuple(sum(min(1.0, rows) for rows in column) / len(drawn) for column in columns)
        return Copies(layer_copy_s(cost, spread), often)

    def wait_s(self, expert: int, replicas: int) -> float:
        """What a call of a replica waits for its own copy: where the layer that it copied before was not called."""
        return self.layer_s[expert] * (1 - self.often[expert] / replicas)

    def busiest_link_s(self, spread: Spread) -> float:
        """What the busiest card's link copies in one layer, for replicas, which copy their next layer in any case.

        With each call the layer after it, and its own where the one before was not called: 2 - p copies, where p is the
        share of layers that are called.
        """
        links: dict[int, float] = {}
        for expert, homes in enumerate(spread.homes):
            share = self.often[expert] / len(homes)
            for device in homes:
                links[device] = links.get(device, 0.0) + share * (2 - share) * self.layer_s[expert]
        return max(links.values())


@dataclass(frozen=True, slots=True)
class CalledExperts:
    """One layer's calls of one micro-batch, in seconds."""

    makespan: float
    """Until the last is computed, on idle devices."""
    busy: Mapping[int, float]
    """What each device computes: no batch is split, for devices that are busy are not given parts."""
    on_trunk: float
    """Of the trunk's own device."""
    calls: int
    remote_calls: int
    remote_rows: float
    copying: float = 0.0
    """In one process: of the layers that are called and are not on the card."""


def called(
    cost: ModelCost, machines: Machines, spread: Spread, rows: Rows, copies: Copies | None = None
) -> CalledExperts:
    """One layer's calls, each given to the device that would end it first, the longest first.

    `copies`: of layers in the host's memory. One process copies what is called: each beside the product of the one
    before, so that the first copy, or the last product, has nothing beside it.
    """
    e, lanes = cost.expert, dict[int, list[float]]()
    jobs = sorted(((count, expert) for expert, count in enumerate(rows) if count), reverse=True)
    at_once = dict.fromkeys(spread.used, 0)
    for _, expert in jobs:
        at_once[spread.homes[expert][0]] += 1
    trunk_host = machines.devices[spread.trunks[0]].host
    calls, remote_calls, remote_rows, busy_s = 0, 0, 0.0, dict[int, float]()
    copying = 0.0
    for count, expert in jobs:
        homes = spread.homes[expert]
        rates = machines.devices[homes[0]].rates
        split = _parts(count, [_call_s(rates, e.form, e.weights, e.nbytes, count / n, 1) for n in _up_to(homes)])
        for home in homes:
            on = machines.devices[home]
            whole = _call_s(on.rates, e.form, e.weights, e.nbytes, count, 0 if spread.in_process else at_once[home])
            busy_s[home] = busy_s.get(home, 0.0) + whole / len(homes) / (1 if spread.in_process else on.rates.lanes)
        copying += copies.layer_s[expert] if copies and spread.in_process else 0.0
        waited = copies.wait_s(expert, len(homes)) if copies and not spread.in_process else 0.0
        parts = [(count, homes)] if split == 1 else [(count / split, (home,)) for home in homes[:split]]
        for some, where in parts:
            device = min(where, key=lambda home: min(_lanes(lanes, machines, home)))
            busy = _lanes(lanes, machines, device)
            first = busy.index(min(busy))
            crowd = 0 if spread.in_process else at_once[device]
            on = machines.devices[device]
            busy[first] += waited + _call_s(on.rates, e.form, e.weights, e.nbytes, some, crowd)
            calls += 1
            if on.host != trunk_host:
                remote_calls, remote_rows = remote_calls + 1, remote_rows + some
    spans = {device: max(busy) if not spread.in_process else sum(busy) for device, busy in lanes.items()}
    makespan = max(spans.values(), default=0.0)
    if copying:
        makespan = max(makespan, copying) + min(makespan, copying) / len(jobs)
    return CalledExperts(
        makespan,
        busy_s,
        spans.get(spread.trunks[0], 0.0),
        calls,
        remote_calls,
        remote_rows,
        copying,
    )


def _up_to(homes: Sequence[int]) -> range:
    return range(1, 1 + len(homes))


def _parts(rows: float, seconds: Sequence[float]) -> int:
    """In how many parts a batch goes to replicas, as `client.selection.split_rows` decides; `seconds`: of each part."""
    chosen, least = 1, (1 - MIN_GAIN) * seconds[0]
    for count, each in enumerate(seconds[1:], 2):
        total = each + (count - 1) * CALL_US / 1e6
        if total < least and count <= rows:
            chosen, least = count, total
    return chosen


def _call_s(rates: DeviceRates, form: str, weights: int, nbytes: int, rows: float, at_once: int) -> float:
    return rates.expert_s(form, weights, nbytes, rows, at_once)


def _lanes(lanes: dict[int, list[float]], machines: Machines, device: int) -> list[float]:
    """When each lane of a device is idle again."""
    return lanes.setdefault(device, [0.0] * min(64, machines.devices[device].rates.lanes))
