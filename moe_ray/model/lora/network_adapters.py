"""The adapters that one expert network holds, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from moe_ray.core import AdapterRows
from moe_ray.errors import AdapterNotHeld

AddedT = TypeVar("AddedT")
"""What an adapter adds, as a backend's kernels want it."""


class NetworkAdapters(Generic[AddedT]):
    """The part of an `FFN` that knows its adapters. One thread may add and remove while others compute."""

    def __init__(self) -> None:
        self._adapters: dict[int, AddedT] = {}
        """Replaced, never changed: who computes goes on with what was there, and needs no lock."""

    def remove_adapter(self, adapter_id: int) -> None:
        """As `FFN.remove_adapter`."""
        self._adapters = {number: added for number, added in self._adapters.items() if number != adapter_id}

    def has_adapter(self, adapter_id: int) -> bool:
        """As `FFN.has_adapter`."""
        return adapter_id in self._adapters

    def hold_adapter(self, adapter_id: int, make: Callable[[], AddedT]) -> None:
        """Hold what `make` makes; nothing where the id is held: it is that of the content, and its memory must stay."""
        if adapter_id not in self._adapters:
            self._adapters = {**self._adapters, adapter_id: make()}

    def held_adapter(self, adapter_id: int) -> AddedT:
        """What an adapter adds. Raises `AdapterNotHeld`."""
        held = self._adapters
        if adapter_id not in held:
            raise AdapterNotHeld(f"adapter {adapter_id} is not held by this expert")
        return held[adapter_id]

    def runs_with_adapters(self, adapters: tuple[AdapterRows, ...]) -> list[tuple[slice, AddedT]]:
        """The rows of a call that have an adapter, and what it adds. Raises `AdapterNotHeld`."""
        found, start = list[tuple[slice, AddedT]](), 0
        for run in adapters:
            if run.adapter_id:
                found.append((slice(start, start + run.count), self.held_adapter(run.adapter_id)))
            start += run.count
        return found
