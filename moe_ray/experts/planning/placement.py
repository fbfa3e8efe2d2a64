"""Which deployment holds which (layer, expert) keys: experts in groups (of one, by default), and spares. Pure data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from moe_ray.core import ExpertKey

_EXPERTS: Final = re.compile(r"Experts?(\d+)(?:-(\d+))?")
_SPARE: Final = re.compile(r"Spare(\d+)")


@dataclass(frozen=True, slots=True)
class Holding:
    """What every replica of one deployment holds."""

    name: str
    """Of the deployment: Expert3, Experts0-1, Spare0."""
    keys: frozenset[ExpertKey]
    spare: int | None = None
    """Which spare it is; None: all layers of its experts, the replicas that the model relies on."""
    variant_keys: frozenset[ExpertKey] = frozenset()
    """What it holds of further models besides, by replicas' numbers of experts (`experts/sharing.py`)."""

    @property
    def all_keys(self) -> frozenset[ExpertKey]:
        """Everything it holds, by replicas' numbers of experts."""
        return self.keys | self.variant_keys

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts it holds in some layer, ascending."""
        return tuple(sorted({expert for _, expert in self.keys}))


def holdings(
    num_layers: int, num_experts: int, experts_per_actor: int = 1, spares: Sequence[Iterable[ExpertKey]] = ()
) -> tuple[Holding, ...]:
    """One deployment per group of consecutive experts, over all layers (the last group may be smaller), then spares."""
    groups = [
        range(first, min(first + experts_per_actor, num_experts)) for first in range(0, num_experts, experts_per_actor)
    ]
    full = [
        Holding(group_name(group), frozenset((layer, expert) for layer in range(num_layers) for expert in group))
        for group in groups
    ]
    return (*full, *(Holding(f"Spare{number}", frozenset(keys), number) for number, keys in enumerate(spares)))


def with_variants(placed: Sequence[Holding], added: Iterable[ExpertKey], num_experts: int) -> tuple[Holding, ...]:
    """The same deployments holding `added` keys of further models too, each where the expert of its number is held.

    A spare for a layer of an expert so holds that layer of all models.
    """
    at: dict[ExpertKey, list[ExpertKey]] = {}
    for layer, number in added:
        at.setdefault((layer, number % num_experts), []).append((layer, number))
    return tuple(
        replace(one, variant_keys=frozenset(more for key in one.keys for more in at.get(key, ()))) for one in placed
    )


def group_name(experts: Sequence[int]) -> str:
    """The name of the deployment that holds these consecutive experts: Expert3, Experts0-1."""
    first, last = experts[0], experts[-1]
    return f"Expert{first}" if first == last else f"Experts{first}-{last}"


def experts_in(name: str) -> range:
    """The experts that a deployment holds over all layers, by its name; none for a spare or another deployment."""
    found = _EXPERTS.fullmatch(name)
    return range(int(found[1]), int(found[2] or found[1]) + 1) if found is not None else range(0)


def rank(name: str) -> tuple[int, int]:
    """The place of a deployment among those of one application: the others, experts in order, spares in order."""
    if (experts := experts_in(name)) != range(0):
        return 1, experts[0]
    spare = _SPARE.fullmatch(name)
    return (2, int(spare[1])) if spare is not None else (0, 0)


def holds_experts(name: str) -> bool:
    """Whether replicas of this deployment compute for experts: whole ones, or as a spare."""
    return rank(name) > (0, 0)
