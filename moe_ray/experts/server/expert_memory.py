"""How much of its card a replica may take, and how much of its weights stays in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from moe_ray.core import ExpertKey


@dataclass(frozen=True, slots=True)
class ExpertMemory:
    """The memory of one replica, in bytes."""

    budget_bytes: int | None = None
    """What it may take of its card; None: no limit."""
    offload_bytes: int = 0
    """Weights that it keeps in the host's memory at least, in whole layers; they are copied to the card for a call."""
    rows: tuple[tuple[float, ...], ...] | None = None
    """rows[layer][expert] of a recorded load: the layers with most of it stay on the card; None: there is no record."""

    def load_of(self, keys: Iterable[ExpertKey]) -> dict[ExpertKey, float] | None:
        """The recorded rows of each key; 0 of those that are not in the record. None: there is no record."""
        if self.rows is None:
            return None
        rows = self.rows
        there = {(layer, expert) for layer, loads in enumerate(rows) for expert in range(len(loads))}
        return {key: rows[key[0]][key[1]] if key in there else 0.0 for key in keys}


NO_LIMITS: Final = ExpertMemory()
