"""A fleet of emulated experts and the trunks that call it, watched while they run."""

from __future__ import annotations

import time

from moe_ray.bench.lab.emulate import (
    RESTORED,
    Autoscaler,
    Samples,
    busy_shares,
    max_over_mean,
    percentile,
    restored_after_s,
)
from moe_ray.bench.lab.fleet import Fleet, Trunks
from moe_ray.bench.report import Row
from moe_ray.console import Report as Progress
from moe_ray.errors import NotReady

PERIOD_S = 0.5
"""How often the autoscaler looks."""
RESTORED_S = 2.0
"""For how long throughput must be up again to be taken for restored."""
WARM_S = 1.5


class WatchedRun:
    """One fleet and its trunks, watched."""

    def __init__(self, name: str, fleet: Fleet, trunks: Trunks, tick: Progress) -> None:
        self.name, self._fleet, self._trunks, self._tick = name, fleet, trunks, tick

    def link(self) -> None:
        """Wait until every trunk is linked to every replica. Raises `NotReady` after half a minute."""
        deadline = time.monotonic() + 30
        while self._trunks.linked() < sum(self._fleet.planned().values()):
            if time.monotonic() > deadline:
                raise NotReady(f"bench skew: {self.name}: the trunks do not find every replica")
            time.sleep(0.05)

    def scale(self, scaler: Autoscaler, seconds: float) -> None:
        """Let the autoscaler act for so long."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            self._fleet.scale(scaler.wanted(now, self._fleet.samples(), self._fleet.planned()))
            self._pause(PERIOD_S)

    def measure(self, case: str, seconds: float) -> Row:
        """A row of what happens in the next seconds, after a short warm-up."""
        self._pause(WARM_S)
        before, began = self._fleet.samples(), time.monotonic()
        calls, hedges = self._counted()
        self._pause(seconds)
        after, ended = self._fleet.samples(), time.monotonic()
        steps = self._trunks.between(began, ended)
        took = [1e3 * step.took_s for step in steps]
        sent, again = (now - was for now, was in zip(self._counted(), (calls, hedges), strict=True))
        return {
            "case": case,
            "replicas": len(after),
            "tokens_per_s": len(steps) * self._fleet.shape.tokens / (ended - began),
            "step_p50_ms": percentile(took, 0.5),
            "step_p99_ms": percentile(took, 0.99),
            "max_over_mean_busy": max_over_mean(busy_shares(before, after, ended - began)),
            "mean_busy": _mean_busy(before, after, ended - began),
            "relief_s": None,
            "extra_calls_share": again / max(1, sent - again),
        }

    def relief_s(self, since: float, tokens_per_s: float) -> float | None:
        """Seconds from `since` until the throughput is restored to that of before."""
        ends, rate = [step.ended for step in self._trunks.steps], tokens_per_s / self._fleet.shape.tokens
        return restored_after_s(ends, since, time.monotonic(), RESTORED * rate, RESTORED_S)

    def curve(self, since: float) -> list[Row]:
        """Tokens per second, second by second, from `since`."""
        ends = [step.ended for step in self._trunks.steps]
        return [
            {
                "run": self.name,
                "at_s": second,
                "tokens_per_s": self._fleet.shape.tokens * sum(since + second <= e < since + second + 1 for e in ends),
            }
            for second in range(int(time.monotonic() - since))
        ]

    def _counted(self) -> tuple[int, int]:
        counters = [pool.counters for pool in self._trunks.dispatchers]
        return sum(c.calls for c in counters), sum(c.hedges for c in counters)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, PERIOD_S))
            self._tick("emulated seconds", 0, 0)
            if self._trunks.failure is not None:
                raise self._trunks.failure


def _mean_busy(before: Samples, after: Samples, seconds: float) -> float:
    shares = busy_shares(before, after, seconds)
    return sum(shares) / max(1, len(shares))
