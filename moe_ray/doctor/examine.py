"""All checks of a machine, in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from moe_ray.doctor.accelerators import examine_cards
from moe_ray.doctor.checkpoints import examine_model
from moe_ray.doctor.credentials import examine_credentials
from moe_ray.doctor.environment import examine_environment
from moe_ray.doctor.finding import Finding, Subject, error, ok
from moe_ray.doctor.machine import examine_machine
from moe_ray.doctor.network import examine_network
from moe_ray.doctor.ports import examine_ports
from moe_ray.doctor.ray_state import examine_ray

Examine = Callable[[Subject], Sequence[Finding]]


def examine_configuration(subject: Subject) -> Sequence[Finding]:
    """Whether flags, environment and file make a configuration."""
    if subject.config_fault is not None:
        return [error("configuration", subject.config_fault, "docs/configuration.md lists every key")]
    return [ok("configuration", "flags, environment and file agree with the keys that there are")]


AREAS: Final[tuple[tuple[str, Examine], ...]] = (
    ("configuration", examine_configuration),
    ("environment", examine_environment),
    ("machine", examine_machine),
    ("cards", examine_cards),
    ("ports", examine_ports),
    ("ray", examine_ray),
    ("network", examine_network),
    ("credentials", examine_credentials),
    ("model", examine_model),
)
"""In the order in which they are told: what is cheap and local first."""


def findings(subject: Subject) -> Iterator[Finding]:
    """What each area finds, as soon as it is found."""
    for _, examine in AREAS:
        yield from examine(subject)
