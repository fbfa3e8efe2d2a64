"""How many replicas each expert should run: a utilisation target with hysteresis, under one budget. Pure data.

A replica cannot be busier than all the time, so how much more there would be to do shows in the calls that wait: by
Little's law their waiting, summed over a second, is how many of them wait on average (as Knative's autoscaler goes by
the requests in flight). And a token that gets past a saturated expert goes on to the others, so what waits there will
be asked of all of them, in the proportions in which they are asked now: they are scaled together, in one step, instead
of each when it is found to be the next bottleneck.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

WORTH_MOVING: Final = 1.2
"""How much more load per replica an expert must have than another would be left with, to be given its replica..."""
WORTH_IN_TIME: Final = 1.04
"""...and how much will do if it lasts..."""
IN_TIME: Final = 10.0
"""...so many times as long."""
SATURATED: Final = 0.9
"""The busy share from which on a replica's waiting calls say that it could do more, not that two came at once."""
MOST_GROWTH: Final = 4.0
"""How many times the load is scaled for at a time: what waits for one expert may not all come to the others."""
_ROUNDING: Final = 1e-9
"""0.6 busy at a target of 0.2 are three replicas, not four."""

Memory = Mapping[int, tuple[int, float]]
"""Expert → (+1 or -1: the direction it is asked into, since when in seconds)."""


@dataclass(frozen=True, slots=True)
class ExpertState:
    """One expert as it stands now."""

    replicas: int
    """Running or starting, less those told to stop: what was last decided."""
    busy: float
    """Sum over its replicas of the share of the look-back window in which they computed: 0..replicas."""
    waiting: float = 0.0
    """Batches waiting, on average over that window and summed over its replicas."""
    min_replicas: int = 1
    max_replicas: int = 1
    wanted: int | None = None
    """Set by hand: exactly that many, not touched by the policy."""


@dataclass(frozen=True, slots=True)
class AutoscaleOptions:
    """What the policy aims at."""

    target_busy: float = 0.6
    """The share of its time that a replica should compute: implied replicas = busy / target_busy."""
    tolerance: float = 0.1
    """No change while the implied number is within this share of the present one."""
    up_after_s: float = 1.0
    """How long too much demand must hold; then all missing replicas are asked for at once."""
    down_after_s: float = 30.0
    """How long too little must hold; then one replica goes, and the wait begins anew."""
    max_total: int | None = None
    """Replicas of all experts together."""


def decide(
    states: Mapping[int, ExpertState], options: AutoscaleOptions, memory: Memory, now: float
) -> tuple[dict[int, int], dict[int, tuple[int, float]]]:
    """Return (expert → replicas it should have, the memory for the next call). `now` is in seconds of any clock.

    Every number lies within its expert's min..max or is the one set by hand. Where `max_total` does not suffice for
    all, hand-set numbers and minima come first, then one replica after the other goes to the expert with most load per
    replica. A replica that runs is taken from its expert only for one that has been hotter by `WORTH_MOVING` for
    `up_after_s` (or by `WORTH_IN_TIME` for `IN_TIME` times as long), and at most half of an expert's at a time, for its
    load was measured over a short while. So the total is exceeded only by hand-set numbers and minima, or for a moment
    after the budget shrank.
    """
    targets = {expert: state.wanted for expert, state in states.items() if state.wanted is not None}
    free = {expert: state for expert, state in sorted(states.items()) if state.wanted is None}
    growth = expected_growth(states.values())
    wishes: dict[int, int] = {}
    after: dict[int, tuple[int, float]] = {}
    for expert, state in free.items():
        wishes[expert], asked = _wish(state, growth, options, memory.get(expert), now)
        if asked is not None:
            after[expert] = asked
    if options.max_total is None:
        return targets | wishes, after
    budget = options.max_total - sum(targets.values())
    least = {
        expert: min(wishes[expert], max(state.min_replicas, math.ceil(_within(state, state.replicas) / 2)))
        for expert, state in free.items()
    }
    while True:
        granted = _share(free, wishes, least, budget, WORTH_IN_TIME)
        at_once = _share(free, wishes, least, budget, WORTH_MOVING)
        spared = []
        for expert, state in free.items():
            keeps = min(wishes[expert], _within(state, state.replicas))
            if granted[expert] >= keeps:
                continue
            direction, since = memory.get(expert, (1, now))
            after[expert] = (-1, since if direction < 0 else now)
            if now - after[expert][1] < options.up_after_s * (1 if at_once[expert] < keeps else IN_TIME):
                least[expert] = keeps
                spared.append(expert)
        if not spared:
            return targets | granted, after


def expected_growth(states: Iterable[ExpertState]) -> float:
    """How many times as much all experts would compute if no call waited for the saturated ones; 1 if none is.

    At most what the expert with the fewest replicas to spare could take, for it would be the next to keep the others
    waiting, and at most `MOST_GROWTH`.
    """
    growth, room = 1.0, MOST_GROWTH
    for state in states:
        if state.busy <= 0:
            continue
        if state.busy >= SATURATED * state.replicas:
            growth = max(growth, 1 + state.waiting / state.busy)
        most = max(state.replicas, state.max_replicas) if state.wanted is None else state.wanted
        room = min(room, most / state.busy)
    return max(1.0, min(growth, room))


def _wish(
    state: ExpertState, growth: float, options: AutoscaleOptions, asked: tuple[int, float] | None, now: float
) -> tuple[int, tuple[int, float] | None]:
    """Return (the replicas one expert would have without a budget, its memory)."""
    present = _within(state, state.replicas)
    implied = growth * state.busy / options.target_busy
    needed = _within(state, math.ceil(implied - _ROUNDING))
    if needed == present or abs(implied - present) <= options.tolerance * present + _ROUNDING:
        return present, None
    direction = 1 if needed > present else -1
    since = asked[1] if asked is not None and asked[0] == direction else now
    if direction > 0:
        return (needed if now - since >= options.up_after_s else present), (direction, since)
    if now - since >= options.down_after_s:
        return present - 1, (direction, now)
    return present, (direction, since)


def _share(
    states: Mapping[int, ExpertState], wishes: Mapping[int, int], least: Mapping[int, int], budget: int, worth: float
) -> dict[int, int]:
    """Between `least` and `wishes`, give `budget` replicas to the experts, hottest first; those that run weigh more."""
    granted = dict(least)

    def rank(expert: int) -> tuple[float, float, int]:
        state, share = states[expert], granted[expert]
        weight = (worth if share < state.replicas else 1.0) / share
        return -weight * state.busy, -weight * state.waiting, expert

    left = budget - sum(granted.values())
    asking = [rank(expert) for expert in states if granted[expert] < wishes[expert]]
    heapq.heapify(asking)
    while left > 0 and asking:
        expert = heapq.heappop(asking)[2]
        granted[expert] += 1
        left -= 1
        if granted[expert] < wishes[expert]:
            heapq.heappush(asking, rank(expert))
    return granted


def _within(state: ExpertState, replicas: int) -> int:
    return max(state.min_replicas, min(state.max_replicas, replicas))
