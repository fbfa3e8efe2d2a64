"""What calls take, learnt from replies: the usual time by number of rows, and how much slower a replica is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

COMPUTE_BOUND_ROWS: Final = 64
"""Rows from which the measured time is taken to grow with the rows."""
SLOWDOWN_HALF_LIFE_S: Final = 5.0
"""How soon a slow replica that is not called any more is tried again."""
MAX_SLOWDOWN: Final = 20.0


class CallCosts:
    """The mean time of calls, one for each power of two of rows."""

    def __init__(self) -> None:
        self._us: dict[int, float] = {}

    def observe(self, rows: int, us: float) -> float:
        """Learn that a call took `us`; return how many times the usual that is."""
        bucket = rows.bit_length() - 1
        usual = self._us.get(bucket)
        if usual is None or usual <= 0:
            self._us[bucket] = us
            return 1.0
        # A stall must not become the usual time: more than twice of it counts as twice.
        self._us[bucket] = usual + 0.05 * (min(us, 2 * usual) - usual)
        return us / usual

    def expect(self, rows: int) -> float | None:
        """Microseconds that a call of `rows` rows takes; None while nothing comparable was measured."""
        points = sorted((self._middle(bucket), us) for bucket, us in self._us.items())
        if not points:
            return None
        if rows <= points[0][0]:
            return points[0][1]
        most, us = points[-1]
        if rows > most:
            same_bucket = rows.bit_length() - 1 == max(self._us)
            if same_bucket:
                return us
            # From a few dozen rows on the call is bound by arithmetic, which grows with the rows.
            return us * rows / most if most >= COMPUTE_BOUND_ROWS else None
        at = next(i for i, point in enumerate(points) if rows <= point[0])
        (low, low_us), (high, high_us) = points[at - 1], points[at]
        return low_us + (rows - low) / (high - low) * (high_us - low_us)

    @staticmethod
    def _middle(bucket: int) -> float:
        return 1.5 * 2**bucket if bucket else 1.0


@dataclass(slots=True)
class SlowdownEstimate:
    """How slow a replica is, as a multiple of the usual; it decays with time, so that the replica is tried again."""

    value: float = 1.0
    at: float = 0.0
    """Monotonic seconds of the last observation."""

    def observe(self, multiple: float, now: float) -> None:
        """Learn that a call took `multiple` times the usual."""
        value = self.read(now)
        self.value = min(MAX_SLOWDOWN, value + 0.2 * (min(multiple, 5 * MAX_SLOWDOWN) - value))
        self.at = now

    def read(self, now: float) -> float:
        """The estimate at `now`; 1.0: as fast as usual."""
        return 1.0 + (self.value - 1.0) * 0.5 ** ((now - self.at) / SLOWDOWN_HALF_LIFE_S)
