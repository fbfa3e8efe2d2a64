"""Skewed traffic and experts whose time is told, not computed: what `bench skew` and its simulation have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_ray.experts.planning.autoscale import AutoscaleOptions, ExpertState, Memory, decide

TOP_K = 2
"""Experts of a token, as Mixtral has it; what follows is exact for two."""

RESTORED = 0.9
"""Share of the throughput before a hot spot moved, from which on it is taken for restored."""


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """How long an emulated expert takes."""

    fixed_us: float
    per_row_us: float

    def seconds(self, rows: int) -> float:
        """Seconds for one call of `rows` rows."""
        return (self.fixed_us + self.per_row_us * rows) / 1e6


class ServiceQueue:
    """One call at a time, in the order of arrival. Seconds of any clock; nothing in it waits."""

    def __init__(self) -> None:
        self._until = self._given = 0.0

    def take(self, now: float, seconds: float) -> float:
        """Accept a call that takes `seconds`; return when it is done."""
        self._until = max(now, self._until) + seconds
        self._given += seconds
        return self._until

    def left_s(self, now: float) -> float:
        """Seconds until it is idle."""
        return max(0.0, self._until - now)

    def computed_s(self, now: float) -> float:
        """Seconds that it has computed until `now`."""
        return self._given - self.left_s(now)


def row_shares(weights: Sequence[float]) -> list[float]:
    """The share of all rows that each expert gets where a token draws two different experts by `weights`."""
    total = sum(weights)
    first = [weight / total for weight in weights]
    both = sum(p / (1 - p) for p in first)
    return [(p + p * (both - p / (1 - p))) / TOP_K for p in first]


def popularity(num_experts: int, max_over_mean: float) -> list[float]:
    """Zipf weights, rank by rank, whose exponent makes the most popular expert's rows `max_over_mean` times the mean.

    1: all alike. At most num_experts / 2, where every token goes to the first.
    """
    low, high = 0.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        shares = row_shares([rank**-middle for rank in range(1, num_experts + 1)])
        low, high = (middle, high) if shares[0] * num_experts < max_over_mean else (low, middle)
    return [rank**-low for rank in range(1, num_experts + 1)]


def shifted(weights: Sequence[float], by: int) -> list[float]:
    """The same popularity with other experts hot: expert e takes rank e - by."""
    return [weights[(expert - by) % len(weights)] for expert in range(len(weights))]


def max_over_mean(values: Sequence[float]) -> float:
    """1 is perfect balance, or nothing at all."""
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0


def even(num_experts: int, total: int) -> dict[int, int]:
    """`total` replicas, as evenly as they go."""
    return {expert: total // num_experts + (expert < total % num_experts) for expert in range(num_experts)}


@dataclass(frozen=True, slots=True)
class ReplicaSample:
    """A replica's counters at one moment."""

    expert: int
    computed_s: float
    waited_s: float
    """All calls together, counted when they are done."""


Samples = Mapping[str, ReplicaSample]


class Autoscaler:
    """The window that `decide` looks back over, and its memory."""

    def __init__(self, options: AutoscaleOptions, window_s: float, most: int) -> None:
        """`most`: replicas that one expert may have."""
        self._options, self._window_s, self._most = options, window_s, most
        self._memory: Memory = {}
        self._past: deque[tuple[float, Samples]] = deque()

    def wanted(self, now: float, samples: Samples, planned: Mapping[int, int]) -> dict[int, int]:
        """The replicas that each expert should have, `planned` being what was last asked for."""
        self._past.append((now, samples))
        while len(self._past) > 2 and self._past[1][0] <= now - self._window_s:
            self._past.popleft()
        began, before = self._past[0]
        busy, waiting = dict.fromkeys(planned, 0.0), dict.fromkeys(planned, 0.0)
        for name, sample in samples.items():
            if now > began:
                start = before.get(name, ReplicaSample(sample.expert, 0.0, 0.0))
                busy[sample.expert] += (sample.computed_s - start.computed_s) / (now - began)
                waiting[sample.expert] += (sample.waited_s - start.waited_s) / (now - began)
        states = {
            expert: ExpertState(count, busy[expert], waiting[expert], max_replicas=self._most)
            for expert, count in planned.items()
        }
        wanted, self._memory = decide(states, self._options, self._memory, now)
        return wanted


def busy_shares(before: Samples, after: Samples, seconds: float) -> list[float]:
    """The share of `seconds` that each replica there all the time has computed."""
    return [(after[name].computed_s - before[name].computed_s) / seconds for name in after if name in before]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def restored_after_s(
    ends: Sequence[float], since: float, until: float, steps_per_s: float, window_s: float
) -> float | None:
    """Seconds from `since` until `window_s` long stretches reach `steps_per_s` again, after they no longer did.

    0: they never failed to. None: not before `until`. `ends`: when steps ended.
    """
    at, fell = since, False
    while at + window_s <= until:
        reached = sum(at <= end < at + window_s for end in ends) >= steps_per_s * window_s
        if fell and reached:
            return at - since
        fell = fell or not reached
        at += 0.1
    return None if fell else 0.0
