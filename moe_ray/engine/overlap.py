"""How many micro-batches a step is cut into: tried out on the machine at hand, then kept while it pays.

While one micro-batch waits for its experts another computes its attention ("ping-pong", MegaScale-Infer,
arXiv:2504.02263, whose rule m >= 2 (1 + Tc / Tf) assumes that trunk and experts are bound by compute on devices of
their own). Cutting a batch also makes every expert read its weights once per part, and where trunk and experts share
cores there may be nothing to overlap; so steps of a kind are timed with each number, and the fastest is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Final

CHOICES: Final = (1, 2, 3)
TRIALS: Final = 5
"""Steps timed with each number before one is chosen."""
KEEP: Final = 400
"""Steps that a choice is used before it is tried against the others again."""
MARGIN: Final = 0.97
"""Another number must take less than this share of one micro-batch's time."""
WORTH: Final = 0.1
"""Share of a step spent waiting for experts below which nothing is tried."""


@dataclass(slots=True)
class _Kind:
    """Steps of about the same size."""

    trials: dict[int, list[float]] = field(default_factory=lambda: {m: [] for m in CHOICES})
    waited: list[float] = field(default_factory=list)
    chosen: int | None = None
    used: int = 0


class Overlap:
    """Chooses the number of micro-batches of each step from the times of those before it. One thread."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, bool], _Kind] = {}

    def choose(self, tokens: int, sequences: int) -> int:
        """The number for a step of so many tokens of so many sequences."""
        if sequences == 1:
            return 1  # a micro-batch is made of whole sequences
        kind = self._kinds.setdefault(_kind(tokens, sequences), _Kind())
        if kind.chosen is not None:
            return kind.chosen
        return min((m for m in CHOICES if m <= sequences), key=lambda m: (len(kind.trials[m]), m))

    def record(self, tokens: int, sequences: int, micro_batches: int, seconds: float, waited: float) -> None:
        """Take in how long a step took, and how much of that it waited for experts."""
        if sequences == 1:
            return
        key = _kind(tokens, sequences)
        kind = self._kinds.setdefault(key, _Kind())
        if kind.chosen is not None:
            kind.used += 1
            if kind.used >= KEEP:
                self._kinds[key] = _Kind()
            return
        kind.trials[micro_batches].append(seconds / tokens)
        if micro_batches == 1:
            kind.waited.append(waited / seconds)
        ones = kind.trials[1]
        if len(ones) >= 2 and median(kind.waited) < WORTH:
            kind.chosen = 1
        elif all(len(kind.trials[m]) >= TRIALS for m in CHOICES if m <= sequences):
            kind.chosen = best({m: times for m, times in kind.trials.items() if times})


def best(times: dict[int, list[float]]) -> int:
    """The number with the lowest median time; 1 unless another is clearly faster."""
    medians = {m: median(t) for m, t in times.items()}
    fastest = min(medians, key=lambda m: (medians[m], m))
    return fastest if medians[fastest] < MARGIN * medians[1] else 1


def _kind(tokens: int, sequences: int) -> tuple[int, bool]:
    return (tokens - 1).bit_length(), tokens > sequences
