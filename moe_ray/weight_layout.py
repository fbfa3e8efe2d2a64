"""A noun of replicas that exchange weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """What the bytes of one key's weights are in memory: replicas of equal layouts can exchange them."""

    format: str
    """Of the weights: "float", or a quantised one."""
    packing: str
    """The order of the bytes: a backend's own, or its build's."""
    dtype: str
    """Of an unquantised item."""
    shape: tuple[int, int]
    """hidden_size, intermediate_size"""
    options: tuple[tuple[str, str], ...] = ()
    """Of the format, by name: its group size, say."""

    def __str__(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options)
        return f"{self.format} {self.dtype} {self.shape[0]} x {self.shape[1]}, {self.packing}{options}"
