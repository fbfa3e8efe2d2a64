"""When the calls of a layer are late, and how many of them may be sent a second time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

UNKNOWN_S: Final = 1.0
"""After how long calls of a size of which nothing is known are late, at least."""
WINDOW: Final = 256
MIN_SAMPLES: Final = 32
MAX_SAVED: Final = 20.0


@dataclass(slots=True)
class HedgePolicy:
    """Learns how long the calls of a layer take, by the size of the largest; keeps the budget of second calls.

    Dean and Barroso 2013, "The Tail at Scale": hedged requests, after the 95th percentile, a few per cent more load.
    """

    percentile: float = 0.95
    factor: float = 2.0
    least_s: float = 0.002
    budget: float = 0.02
    """Second calls per call."""
    _latencies: dict[int, deque[float]] = field(default_factory=dict)
    _limit_s: dict[int, float] = field(default_factory=dict)
    _since: dict[int, int] = field(default_factory=dict)
    _saved: float = 4.0

    def record_latency(self, rows: int, seconds: float, calls: int) -> None:
        """Learn that all of `calls` calls, the largest of `rows` rows, were answered after `seconds`."""
        bucket = rows.bit_length()
        latencies = self._latencies.setdefault(bucket, deque(maxlen=WINDOW))
        latencies.append(seconds)
        self._saved = min(MAX_SAVED, self._saved + self.budget * calls)
        self._since[bucket] = self._since.get(bucket, 0) + 1
        due = bucket not in self._limit_s or self._since[bucket] >= MIN_SAMPLES
        if len(latencies) >= MIN_SAMPLES and due:
            self._since[bucket] = 0
            usual = sorted(latencies)[int(self.percentile * (len(latencies) - 1))]
            self._limit_s[bucket] = max(self.least_s, self.factor * usual)

    def limit_s(self, rows: int) -> float:
        """Seconds after which calls, the largest of `rows` rows, are late.

        For an unknown size: as if time grew with rows from the nearest smaller size, and `UNKNOWN_S` at least.
        """
        bucket = rows.bit_length()
        limit_s = self._limit_s.get(bucket)
        if limit_s is not None:
            return limit_s
        below = max((known for known in self._limit_s if known < bucket), default=None)
        return UNKNOWN_S if below is None else max(UNKNOWN_S, self._limit_s[below] * 2 ** (bucket - below))

    def take(self) -> bool:
        """Take one second call from the budget; False if it is used up."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
