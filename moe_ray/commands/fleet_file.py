"""`moe-ray plan --fleet`: machines from a YAML file, from a list such as `8x T4-16GB, 4x cpu:16`, or this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import yaml
from pydantic import Field, ValidationError

from moe_ray.config.section import Section, explain
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.card_table import (
    CORE_GIB,
    CORE_READ_GB_S,
    CORE_TFLOPS,
    HOST_READ_GB_S,
    card_named,
)
from moe_ray.experts.planning.machines import Device, Machines
from moe_ray.experts.planning.network_step import Network
from moe_ray.experts.planning.rates import DataSheet

GIB: Final = 2**30
MOST: Final = 256
"""Devices of one fleet: the search looks at each."""
_ITEM: Final = re.compile(r"(?:(\d+)\s*x\s+|(\d+)x)?([A-Za-z][\w .:+-]*?)(?:@(\d+(?:\.\d+)?))?")
_FORM: Final = '--fleet: expected a file, `here`, or a list such as "8x T4-16GB, 1x L4@0.80, 4x cpu:16"'


class FleetNetwork(Section):
    """What lies between hosts."""

    gbit: float | None = Field(default=None, gt=0)
    """Gbit/s of a host's link, in each direction. Default: it takes no time."""
    latency_us: float = Field(default=0.0, ge=0)
    """Microseconds one way."""


class FleetMachine(Section):
    """Machines that are alike: cards, or hosts whose CPU computes."""

    card: str | None = None
    """A name of the table, or any other with the figures below."""
    cpu_cores: int | None = Field(default=None, ge=1, le=1024)
    count: int = Field(default=1, ge=1, le=MOST)
    """Cards, or hosts without one."""
    per_host: int = Field(default=1, ge=1, le=64)
    """Cards in one host: between them nothing passes a network."""
    memory_gib: float | None = Field(default=None, gt=0)
    read_gb_s: float | None = Field(default=None, gt=0)
    tflops: Mapping[str, float] = {}
    """Dense TFLOP/s by dtype: bfloat16, float16, float32, int8."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Of one card, or one host."""


class FleetFile(Section):
    """The whole file."""

    network: FleetNetwork = FleetNetwork()
    machines: tuple[FleetMachine, ...] = Field(min_length=1)


def read_fleet(text: str, network: Network | None = None) -> Machines:
    """The machines that `--fleet` names; `network`: of the flags, in the place of the file's. Raises `ConfigError`."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml", ".json"):
        described = _from_file(path)
    else:
        described = FleetFile(machines=tuple(_from_word(word.strip()) for word in text.split(",") if word.strip()))
    devices: list[Device] = []
    for number, machine in enumerate(described.machines):
        found = _device(machine, f"--fleet: machines.{number}")
        host = 1 + max((device.host for device in devices), default=-1)
        devices += [_on_host(found, host + index // machine.per_host) for index in range(machine.count)]
    if len(devices) > MOST:
        raise ConfigError(f"--fleet: at most {MOST} cards and CPU hosts, got {len(devices)}")
    told = Network(described.network.latency_us / 1e3, described.network.gbit)
    return Machines(tuple(devices), network or told)


def _from_file(path: Path) -> FleetFile:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--fleet {path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--fleet {path}: no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--fleet {path}: expected `machines:` with a list, and maybe `network:`")
    try:
        return FleetFile(**tree)
    except ValidationError as error:
        raise ConfigError(f"--fleet {path}: {explain(error)}") from None


def _from_word(word: str) -> FleetMachine:
    found = _ITEM.fullmatch(word)
    if found is None:
        raise ConfigError(f"{_FORM}, got {word!r}")
    name, price = found[3].strip(), None if found[4] is None else float(found[4])
    count = int(found[1] or found[2] or 1)
    if not 1 <= count <= MOST:
        raise ConfigError(f"--fleet: {word!r}: 1 to {MOST} of a kind")
    if name.lower().startswith("cpu"):
        kind, _, cores = name.partition(":")
        if kind.lower() != "cpu" or not cores.isdigit() or not 1 <= int(cores) <= 1024:
            raise ConfigError(f"--fleet: {word!r}: a CPU host is cpu:CORES, as in 4x cpu:16")
        return FleetMachine(cpu_cores=int(cores), count=count, price_per_hour=price)
    return FleetMachine(card=name, count=count, price_per_hour=price)


def _device(machine: FleetMachine, where: str) -> Device:
    """One of them, on host 0."""
    if (machine.card is None) == (machine.cpu_cores is None):
        raise ConfigError(f"{where}: name either a `card` or `cpu_cores`")
    if unknown := sorted(set(machine.tflops) - {"float32", "float16", "bfloat16", "int8"}):
        raise ConfigError(f"{where}.tflops: {', '.join(unknown)}; allowed: bfloat16, float16, float32, int8")
    if machine.cpu_cores is not None:
        cores = machine.cpu_cores
        rates = DataSheet(
            machine.read_gb_s or min(HOST_READ_GB_S, CORE_READ_GB_S * cores),
            {"bfloat16": CORE_TFLOPS * cores, "float32": CORE_TFLOPS * cores, **machine.tflops},
            cores,
            is_cpu=True,
        )
        memory = int((machine.memory_gib or CORE_GIB * cores) * GIB)
        return Device(f"cpu:{cores}", 0, memory, rates, True, True, machine.price_per_hour)
    assert machine.card is not None
    if machine.memory_gib is not None and machine.read_gb_s is not None and machine.tflops:
        if not {"bfloat16", "float16"} & set(machine.tflops):
            raise ConfigError(f"{where}.tflops: needs bfloat16 or float16")
        tflops = {"float32": max(machine.tflops.values()) / 8, **machine.tflops}
        return Device(
            machine.card,
            0,
            int(machine.memory_gib * GIB),
            DataSheet(machine.read_gb_s, tflops),
            has_bfloat16="bfloat16" in tflops,
            price_per_hour=machine.price_per_hour,
        )
    try:
        name, sheet = card_named(machine.card)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}, with memory_gib, read_gb_s and tflops") from None
    tflops = {**sheet.tflops(), **machine.tflops}
    return Device(
        name,
        0,
        int((machine.memory_gib or sheet.gib) * GIB),
        DataSheet(machine.read_gb_s or sheet.read_gb_s, tflops),
        has_bfloat16="bfloat16" in tflops,
        price_per_hour=machine.price_per_hour,
    )


def _on_host(device: Device, host: int) -> Device:
    return replace(device, host=host)
