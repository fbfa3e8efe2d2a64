"""Which replicas get an expert's rows, and when a call is late: pure functions and the figures that they go by."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

MANY: Final = 4
"""Replicas up to which all are compared; of more, two drawn at random (Mitzenmacher 2001, "Power of Two Choices")."""
NEAR: Final = 1.25
"""Within this factor the same node wins. Of equals, whoever had fewer calls."""
CALL_US: Final = 60.0
"""What one more call costs the trunk: send, receive, bookkeeping (30 to 60 us over sockets: `bench transport`)."""
WORTH: Final = 0.15
"""A batch is split if that saves this share of its time."""
COMPUTE_BOUND: Final = 64
"""Rows from which what was measured is taken to grow with the rows."""
UNMEASURED_ROWS: Final = 128
"""Rows a part has at least while it is not known what rows cost."""
PACE_HALF_LIFE_S: Final = 5.0
"""How soon a slow replica that is called no more is given another chance."""
WORST_PACE: Final = 20.0
UNKNOWN_S: Final = 1.0
"""After how long a call of a size of which nothing is known is late, at least."""
FRESH_S: Final = 0.5
"""How long what a replica said about its queue is believed."""


def backlog(outstanding_rows: int, said_rows: int, said_ago_s: float) -> int:
    """Rows that a replica has to compute first: those sent to it, or what it said of its queue while that is fresh."""
    return max(outstanding_rows, said_rows if said_ago_s < FRESH_S else 0)


class Candidate(Protocol):
    """What is known of a replica when it is chosen."""

    outstanding_rows: int
    calls: int

    @property
    def replica_id(self) -> str: ...

    @property
    def node_id(self) -> str: ...

    @property
    def usable(self) -> bool:
        """Whether it can be called at all."""
        ...

    def trusted(self, now: float) -> bool:
        """Whether its answers have been right lately."""
        ...

    def backlog(self, now: float) -> int:
        """Rows that it has to compute before more."""
        ...

    def pace(self, now: float) -> float:
        """How slow it is, as a multiple of the usual."""
        ...


C = TypeVar("C", bound=Candidate)


def choose(
    candidates: Sequence[C],
    rows: int,
    now: float,
    avoid: Collection[str] = (),
    node_id: str | None = None,
    draw: random.Random | None = None,
) -> C | None:
    """Return who would be done with `rows` more rows first; None if nobody is usable outside `avoid`.

    Replicas that gave unusable answers (not `trusted`) are taken only where there is nobody else.
    """
    usable = [c for c in candidates if c.usable and c.replica_id not in avoid]
    if len(usable) < 2:
        return usable[0] if usable else None
    usable = [c for c in usable if c.trusted(now)] or usable
    if len(usable) > MANY:
        usable = (draw or random).sample(usable, 2)
    scores = [(c.backlog(now) + rows) * _notable(c.pace(now)) for c in usable]
    least = NEAR * min(scores)
    near = [(c.node_id != node_id, score, c.calls, i) for i, (c, score) in enumerate(zip(usable, scores, strict=True))]
    return usable[min(key for key in near if key[1] <= least)[-1]]


def _notable(pace: float) -> float:
    return pace if pace > NEAR else 1.0  # the rest is noise


def split(rows: int, paces: Sequence[float], costs: Costs) -> list[int]:
    """Return how many of `rows` each replica takes, adding up; zeros for those that are better left out.

    Only a batch that is bound by computing gains: one bound by reading the weights takes as long in two halves.
    `paces`: of the replicas, 1.0 as usual, 2.0 twice as slow, the preferred one first.
    """
    best, most = [rows, *(0 for _ in paces[1:])], len(paces)
    whole = costs.expect(rows)
    if whole is None:
        most = max(1, min(most, rows // UNMEASURED_ROWS))
        return best if most < 2 else _shares(rows, paces, most)
    least = (1 - WORTH) * whole * paces[0]
    for count in range(2, most + 1):
        shares = _shares(rows, paces, count)
        slowest = max((costs.expect(n) or 0.0) * pace for n, pace in zip(shares, paces, strict=True) if n)
        if slowest + (count - 1) * CALL_US < least:
            best, least = shares, slowest + (count - 1) * CALL_US
    return best


def _shares(rows: int, paces: Sequence[float], count: int) -> list[int]:
    speed = [1 / pace for pace in paces[:count]]
    ends, total = [], 0.0
    for one in speed:
        total += one
        ends.append(round(rows * total / sum(speed)))
    shares = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return shares + [0] * (len(paces) - count)


class Costs:
    """What calls of so many rows take, learnt from replies; a mean for each power of two of rows."""

    def __init__(self) -> None:
        self._us: dict[int, float] = {}

    def observe(self, rows: int, us: float) -> float:
        """Learn that a call took `us`; return how many times the usual that is."""
        bucket = rows.bit_length() - 1
        usual = self._us.get(bucket)
        if usual is None or usual <= 0:
            self._us[bucket] = us
            return 1.0
        # A stall must not become the usual: what is far above it counts as twice.
        self._us[bucket] = usual + 0.05 * (min(us, 2 * usual) - usual)
        return us / usual

    def expect(self, rows: int) -> float | None:
        """Microseconds that a call of `rows` rows takes; None while nothing like it is known."""
        points = sorted((self._middle(bucket), us) for bucket, us in self._us.items())
        if not points:
            return None
        if rows <= points[0][0]:
            return points[0][1]
        most, us = points[-1]
        if rows > most:
            # From a few dozen rows on computing is what takes the time, and it grows with them.
            near = rows.bit_length() - 1 == max(self._us)
            return us if near else us * rows / most if most >= COMPUTE_BOUND else None
        at = next(i for i, point in enumerate(points) if rows <= point[0])
        (low, low_us), (high, high_us) = points[at - 1], points[at]
        return low_us + (rows - low) / (high - low) * (high_us - low_us)

    @staticmethod
    def _middle(bucket: int) -> float:
        return 1.5 * 2**bucket if bucket else 1.0


@dataclass(slots=True)
class Pace:
    """How slow a replica is, as a multiple of the usual; forgotten with time, so that it is tried again."""

    value: float = 1.0
    at: float = 0.0

    def observe(self, times: float, now: float) -> None:
        """Learn that a call took so many times the usual."""
        value = self.read(now)
        self.value = min(WORST_PACE, value + 0.2 * (min(times, 5 * WORST_PACE) - value))
        self.at = now

    def read(self, now: float) -> float:
        return 1.0 + (self.value - 1.0) * 0.5 ** ((now - self.at) / PACE_HALF_LIFE_S)


@dataclass(slots=True)
class Lateness:
    """When a step's calls are late, by what such steps took lately; and how many second calls may be made.

    Dean and Barroso 2013, "The Tail at Scale": hedged requests, after the 95th percentile, a few per cent more load.
    """

    percentile: float = 0.95
    factor: float = 2.0
    least_s: float = 0.002
    budget: float = 0.02
    """Second calls per call."""
    _took: dict[int, deque[float]] = field(default_factory=dict)
    _limit_s: dict[int, float] = field(default_factory=dict)
    _since: dict[int, int] = field(default_factory=dict)
    _saved: float = 4.0

    def observe(self, rows: int, took_s: float, calls: int) -> None:
        """Learn that `calls` calls, the largest of `rows` rows, were home after `took_s`."""
        bucket = rows.bit_length()
        took = self._took.setdefault(bucket, deque(maxlen=256))
        took.append(took_s)
        self._saved = min(20.0, self._saved + self.budget * calls)
        self._since[bucket] = self._since.get(bucket, 0) + 1
        if len(took) >= 32 and (bucket not in self._limit_s or self._since[bucket] >= 32):
            self._since[bucket] = 0
            usual = sorted(took)[int(self.percentile * (len(took) - 1))]
            self._limit_s[bucket] = max(self.least_s, self.factor * usual)

    def limit_s(self, rows: int) -> float:
        """Seconds after which calls, the largest of `rows` rows, are late.

        For a size that is not known, as if time grew with rows from the nearest size below; `UNKNOWN_S` at least.
        """
        bucket = rows.bit_length()
        if (limit_s := self._limit_s.get(bucket)) is not None:
            return limit_s
        below = max((known for known in self._limit_s if known < bucket), default=None)
        return UNKNOWN_S if below is None else max(UNKNOWN_S, self._limit_s[below] * 2 ** (bucket - below))

    def spend(self) -> bool:
        """Take one second call from the budget; False if it is used up."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
