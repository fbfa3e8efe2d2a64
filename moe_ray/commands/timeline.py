"""Where the time of a start goes: named stretches, one after the other."""

from __future__ import annotations

import time


class Timeline:
    """Stretches of time from the start of this object on; each ends where the next begins."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.stretches: list[tuple[str, float]] = []

    def mark(self, what: str) -> None:
        """End the present stretch and call it `what`."""
        now = time.monotonic()
        self.stretches.append((what, now - self._last))
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the start to the last mark."""
        return self._last - self.started

    def __str__(self) -> str:
        return " · ".join(f"{what} {seconds:.1f}" for what, seconds in self.stretches) + " s"
