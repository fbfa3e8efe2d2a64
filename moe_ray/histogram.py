"""Counts of values by size, as Prometheus wants them: cheap enough to count every token of every stream."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

STEP_BOUNDS: Final = tuple(0.0001 * 1.5**k for k in range(1, 36))
"""Seconds, of whatever lasts as long as a part of a step or as a whole request: those of TGI's durations."""


class Histogram:
    """How many values were at most as large as each of `bounds`. One thread observes; any may read.

    >>> sizes = Histogram((1, 10))
    >>> for size in (1, 3, 50):
    ...     sizes.observe(size)
    >>> sizes.counts, sizes.total
    ([1, 1, 1], 54.0)
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` ascend."""
        self.bounds: Final = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """Values above the bound before and at most the bound of the same place; the last: above all bounds."""
        self.total = 0.0
        """The sum of all values."""

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def rounded_bounds(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, … up to `most`.

    >>> rounded_bounds(25)
    (1, 2, 5, 10, 20)
    """
    bounds: list[int] = []
    power = 1
    while power <= most:
        bounds += [step * power for step in (1, 2, 5) if step * power <= most]
        power *= 10
    return tuple(bounds)
