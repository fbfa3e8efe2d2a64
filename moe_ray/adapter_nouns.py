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
class AdapterEntry:
    """An adapter that is served under a name, or was."""

    name: str
    adapter_id: int
    source: str
    """A directory, which every node has, or a repository of the Hugging Face Hub."""
    version: int
    """Of two entries of one name, the one with the higher version counts: nanoseconds since 1970."""
    removed: bool = False

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(self.adapter_id, self.source)


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Consecutive rows of one adapter."""

    adapter_id: int
    """0: of none."""
    count: int
