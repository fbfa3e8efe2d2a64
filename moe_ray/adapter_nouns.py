"""The nouns of adapters, which every process uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Which adapter, and where it is read from."""

    adapter_id: int
    """Of its contents, the same in every process: 1 .. 2^63 - 1."""
    source: str
    """A directory, which every node has."""


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Consecutive rows of one adapter."""

    adapter_id: int
    """0: of none."""
    count: int
