"""Which replica gets an expert's rows, and whether several share them: pure functions."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Final, Protocol, TypeVar

from moe_ray.experts.client.cost_model import CallCosts

COMPARE_ALL: Final = 4
"""Up to so many replicas are all compared; of more, two drawn at random (Mitzenmacher 2001, "Power of Two Choices")."""
NEAR: Final = 1.25
"""Within this factor of the best score the trunk's node wins, then the replica with fewer calls."""
CALL_US: Final = 60.0
"""What one more call costs the trunk: send, receive, accounting (30 to 60 us over sockets: `bench transport`)."""
MIN_GAIN: Final = 0.15
"""A batch is split if that saves this share of its time."""
MIN_UNMEASURED_ROWS: Final = 128
"""Rows that a share has at least while the cost of rows is not known."""


class Candidate(Protocol):
    """What is known of a replica when one is selected."""

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
        """Whether it is not quarantined."""
        ...

    def backlog(self, now: float) -> int:
        """Rows that it has to compute before more."""
        ...

    def slowdown_at(self, now: float) -> float:
        """How slow it is, as a multiple of the usual."""
        ...


C = TypeVar("C", bound=Candidate)


def select_replica(
    candidates: Sequence[C],
    rows: int,
    now: float,
    avoid: Collection[str] = (),
    node_id: str | None = None,
    draw: random.Random | None = None,
) -> C | None:
    """Return the replica that is expected to finish `rows` more rows first; None if none is usable outside `avoid`.

    Quarantined replicas are selected only where there is no other. `node_id`: of the trunk.
    """
    usable = [c for c in candidates if c.usable and c.replica_id not in avoid]
    if len(usable) < 2:
        return usable[0] if usable else None
    usable = [c for c in usable if c.trusted(now)] or usable
    if len(usable) > COMPARE_ALL:
        usable = (draw or random).sample(usable, 2)
    scores = [(c.backlog(now) + rows) * _significant(c.slowdown_at(now)) for c in usable]
    limit = NEAR * min(scores)
    keys = [(c.node_id != node_id, score, c.calls, i) for i, (c, score) in enumerate(zip(usable, scores, strict=True))]
    return usable[min(key for key in keys if key[1] <= limit)[-1]]


def _significant(slowdown: float) -> float:
    return slowdown if slowdown > NEAR else 1.0  # less is noise


def split_rows(rows: int, slowdowns: Sequence[float], costs: CallCosts) -> list[int]:
    """Return how many of `rows` each replica gets, adding up to `rows`; zeros for replicas that are better left out.

    Only a batch that is bound by arithmetic gains: one bound by reading the weights takes as long in two halves.
    `slowdowns`: of the replicas, 1.0 as usual, 2.0 twice as slow, the preferred one first.
    """
    best = [rows, *(0 for _ in slowdowns[1:])]
    most = len(slowdowns)
    whole = costs.expect(rows)
    if whole is None:
        most = max(1, min(most, rows // MIN_UNMEASURED_ROWS))
        return best if most < 2 else _shares(rows, slowdowns, most)
    least = (1 - MIN_GAIN) * whole * slowdowns[0]
    for count in range(2, most + 1):
        shares = _shares(rows, slowdowns, count)
        slowest = max((costs.expect(n) or 0.0) * slow for n, slow in zip(shares, slowdowns, strict=True) if n)
        total = slowest + (count - 1) * CALL_US
        if total < least:
            best = shares
            least = total
    return best


def _shares(rows: int, slowdowns: Sequence[float], count: int) -> list[int]:
    speeds = [1 / slow for slow in slowdowns[:count]]
    ends = []
    total = 0.0
    for speed in speeds:
        total += speed
        ends.append(round(rows * total / sum(speeds)))
    shares = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return shares + [0] * (len(slowdowns) - count)
