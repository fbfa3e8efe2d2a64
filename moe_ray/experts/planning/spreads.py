"""Ways to place a model on machines: whole on single devices, or pulled apart, with replicas on what remains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from moe_ray.experts.planning.cards import PROCESS_BYTES
from moe_ray.experts.planning.held_bytes import card_bytes, whole_card_bytes
from moe_ray.experts.planning.machines import Machines, Spread
from moe_ray.experts.planning.model_cost import ModelCost
from moe_ray.experts.planning.rates import DeviceRates

LEFT: Final = ("nothing", "experts", "trunks")
"""What devices that the first copy does not need are used for."""


@dataclass(frozen=True, slots=True)
class _Room:
    """What is on each device so far."""

    machines: Machines
    held: dict[int, int]
    processes: dict[int, int]

    def takes(self, device: int, nbytes: int) -> bool:
        """Put an actor there, if it fits."""
        free = self.machines.devices[device].usable_bytes - self.held.get(device, 0)
        if free - PROCESS_BYTES * (1 + self.processes.get(device, 0)) < nbytes:
            return False
        self.held[device] = self.held.get(device, 0) + nbytes
        self.processes[device] = self.processes.get(device, 0) + 1
        return True


def whole(cost: ModelCost, machines: Machines, cache_bytes: int) -> Iterator[Spread]:
    """The model in one process: on one device of each kind that holds it, and a copy on each of its kind."""
    need = whole_card_bytes(cost) + cache_bytes + PROCESS_BYTES
    for devices in machines.kinds().values():
        if machines.devices[devices[0]].usable_bytes < need or not _may_hold(cost, machines, devices[0]):
            continue
        for copies in {1, len(devices)}:
            used = tuple(devices[:copies])
            homes = tuple((used[0],) for _ in range(cost.num_experts))
            yield Spread(used, homes, True, cost.num_experts, tuple((device, 1) for device in used))


def apart(
    cost: ModelCost,
    machines: Machines,
    cache_bytes: int,
    per_actor: Sequence[int],
    shares: Sequence[float] | None = None,
) -> Iterator[Spread]:
    """Trunk and experts in processes of their own: by the trunk's device, the experts' devices, what else is done."""
    for devices in machines.kinds().values():
        trunk = devices[0]
        able = [device for device in range(len(machines.devices)) if _may_hold(cost, machines, device)]
        others = [device for device in able if device != trunk]
        others.sort(key=lambda device: _expert_s(cost, machines.devices[device].rates))
        for count in _counts(len(others)):
            for beside_trunk in (False, True) if trunk in able else (False,):
                homes = [trunk, *others[:count]] if beside_trunk else others[:count]
                for size in per_actor if homes else ():
                    for left in LEFT if count < len(others) else LEFT[:1]:
                        made = _placed(cost, machines, cache_bytes, trunk, homes, others[count:], size, left, shares)
                        if made is not None:
                            yield made


def _placed(
    cost: ModelCost,
    machines: Machines,
    cache_bytes: int,
    trunk: int,
    homes: Sequence[int],
    free: Sequence[int],
    size: int,
    left: str,
    shares: Sequence[float] | None,
) -> Spread | None:
    """One placement; None where it does not fit."""
    room = _Room(machines, {}, {})
    if not room.takes(trunk, cost.trunk_bytes + cache_bytes):
        return None
    groups = [range(first, min(first + size, cost.num_experts)) for first in range(0, cost.num_experts, size)]
    heat = [sum(shares[expert] for expert in group) if shares else float(len(group)) for group in groups]
    hottest = sorted(range(len(groups)), key=lambda group: -heat[group])
    where: list[list[int]] = [[] for _ in groups]
    load = dict.fromkeys(homes, 0.0)
    for group in hottest:
        if not _put(cost, machines, room, load, groups, heat, group, where):
            return None
    trunks = [trunk]
    if left == "trunks":
        alike = [device for device in free if machines.devices[device].name == machines.devices[trunk].name]
        trunks += [device for device in alike if room.takes(device, cost.trunk_bytes + cache_bytes)]
    elif left == "experts":
        load = dict.fromkeys(free, 0.0)
        placed = bool(load)
        while placed:
            placed = False
            for group in hottest:
                placed |= _put(cost, machines, room, load, groups, heat, group, where)
    if left != "nothing" and len(trunks) == 1 and all(len(homes_of) == 1 for homes_of in where):
        return None  # the same as nothing
    of_expert = tuple(tuple(where[expert // size]) for expert in range(cost.num_experts))
    return Spread(tuple(trunks), of_expert, False, size, tuple(room.processes.items()))


def _put(
    cost: ModelCost,
    machines: Machines,
    room: _Room,
    load: dict[int, float],
    groups: Sequence[range],
    heat: Sequence[float],
    group: int,
    where: list[list[int]],
) -> bool:
    """Put one more copy of a group on the device that would be least loaded by it; whether one had room."""

    def after(device: int) -> float:
        rates = machines.devices[device].rates
        return load[device] + heat[group] * _expert_s(cost, rates) / rates.lanes

    for device in sorted(load, key=after):
        if device not in where[group] and room.takes(device, card_bytes(cost, groups[group])):
            load[device] = after(device)
            where[group].append(device)
            return True
    return False


def _may_hold(cost: ModelCost, machines: Machines, device: int) -> bool:
    """Whether experts may be there: those that are partly in the host's memory are copied to cards."""
    return not cost.offload or not machines.devices[device].is_cpu


def _expert_s(cost: ModelCost, rates: DeviceRates) -> float:
    return rates.expert_s(cost.expert.form, cost.expert.weights, cost.expert.nbytes, 1.0, 1)


def _counts(most: int) -> list[int]:
    """0, 1, 2, 4, … and all."""
    return sorted({0, *(2**power for power in range(most.bit_length()) if 2**power <= most), most})
