"""Devices that a model may be placed on, and the placement of trunk and experts on them. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from moe_ray.experts.planning.cards import PROCESS_BYTES, RESERVE
from moe_ray.experts.planning.network_step import Network
from moe_ray.experts.planning.rates import DeviceRates

CPU_CACHE_SHARE: Final = 5
"""A CPU's KV cache takes one part in so many of the free memory..."""
CPU_CACHE_BYTES: Final = 4 * 2**30
"""...and at most this, unless `engine.kv_cache_gib` says otherwise."""


@dataclass(frozen=True, slots=True)
class Device:
    """One card, or all cores of one host."""

    name: str
    """Of its kind: T4-16GB, cpu:16."""
    host: int
    memory_bytes: int
    rates: DeviceRates
    is_cpu: bool = False
    has_bfloat16: bool = True
    price_per_hour: float | None = None
    measured: bool = False
    """Whether its rates were measured; else they are those of a data sheet, with assumed shares."""

    @property
    def usable_bytes(self) -> int:
        """Memory for weights and KV cache, a process's own part not yet taken away."""
        return int(self.memory_bytes * (1 - RESERVE))


@dataclass(frozen=True, slots=True)
class Machines:
    """The devices, and the network between their hosts."""

    devices: tuple[Device, ...]
    network: Network = field(default_factory=Network)

    def kinds(self) -> dict[str, list[int]]:
        """The devices of each kind, in the order in which they were named."""
        found: dict[str, list[int]] = {}
        for number, device in enumerate(self.devices):
            found.setdefault(device.name, []).append(number)
        return found


@dataclass(frozen=True, slots=True)
class Spread:
    """Where trunk and experts are."""

    trunks: tuple[int, ...]
    """The device of each trunk."""
    homes: tuple[tuple[int, ...], ...]
    """Of each expert: the devices that hold it. In one process: the trunk's."""
    in_process: bool = False
    per_actor: int = 1
    """Consecutive experts that share an actor."""
    actors_on: tuple[tuple[int, int], ...] = ()
    """(device, processes on it)."""

    @property
    def used(self) -> tuple[int, ...]:
        """The devices that something is on, ascending."""
        return tuple(sorted({*self.trunks, *(device for homes in self.homes for device in homes)}))

    @property
    def copies(self) -> int:
        """Replicas of experts beyond the first of each."""
        return sum(len(homes) - 1 for homes in self.homes)


def kv_tokens(machines: Machines, spread: Spread, held_bytes: dict[int, int], bytes_per_token: int) -> int:
    """Tokens of KV cache of all trunks together; `held_bytes`: weights on each device. 0 where there is no room."""
    tokens, processes = 0, dict(spread.actors_on)
    for device in spread.trunks:
        on = machines.devices[device]
        left = on.usable_bytes - held_bytes.get(device, 0) - PROCESS_BYTES * processes.get(device, 1)
        left //= spread.trunks.count(device)
        if on.is_cpu:
            left = min(left // CPU_CACHE_SHARE, CPU_CACHE_BYTES)
        tokens += max(0, left) // bytes_per_token
    return tokens


def held_on(spread: Spread, trunk_bytes: int, expert_bytes: int) -> dict[int, int]:
    """Bytes of weights on each device."""
    held: dict[int, int] = {}
    for device in spread.trunks:
        copy = len(spread.homes) * expert_bytes if spread.in_process else 0
        held[device] = held.get(device, 0) + trunk_bytes + copy
    if spread.in_process:
        return held
    for homes in spread.homes:
        for device in homes:
            held[device] = held.get(device, 0) + expert_bytes
    return held
