"""How many trunks should run: by the requests that wait and the KV cache in use, with hysteresis. Pure data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

DOWN_MARGIN: Final = 0.9
"""One trunk less must leave this share of every target, else it would soon be wanted again."""
_ROUNDING: Final = 1e-9

Asked = tuple[int, float]
"""(+1 or -1: the direction that is asked for, since when in seconds)."""


@dataclass(frozen=True, slots=True)
class TrunksState:
    """All trunks as they stand now; loads are sums over them, each a mean over the look-back window."""

    replicas: int
    """Running or starting, less those told to stop: what was last decided."""
    reporting: int
    """Of these, those that say what they do; fewer while some start."""
    running: float = 0.0
    """Requests being computed."""
    waiting: float = 0.0
    """Requests that wait to be admitted."""
    kv_use: float = 0.0
    """Shares of KV blocks held by sequences: 0..reporting."""
    min_replicas: int = 1
    max_replicas: int = 1
    wanted: int | None = None
    """Set by hand: exactly that many, not touched by the policy."""


@dataclass(frozen=True, slots=True)
class TrunkScaleOptions:
    """What the policy aims at."""

    max_num_seqs: int = 64
    """Requests that one trunk computes together."""
    target_kv_use: float = 0.8
    """The share of its KV blocks that a trunk's sequences should hold at most."""
    target_waiting: float = 2.0
    """How many requests may wait per trunk, on average."""
    up_after_s: float = 5.0
    """How long too much demand must hold; then all missing trunks are asked for at once."""
    down_after_s: float = 60.0
    """How long too little must hold; then one trunk goes, and the wait begins anew."""


def fitting(state: TrunksState, options: TrunkScaleOptions, margin: float = 1.0) -> int:
    """Return how many trunks hold what runs and waits, `margin` times each target being used.

    What waits says nothing of its size: a queue asks for one trunk more than there are, and again when that one
    reports and the queue is still there.
    """
    slots = (state.running + state.waiting) / (options.max_num_seqs * margin)
    cache = state.kv_use / (options.target_kv_use * margin)
    queue = min(state.waiting / (options.target_waiting * margin), state.reporting + 1)
    return max(1, math.ceil(max(slots, cache, queue) - _ROUNDING))


def decide(state: TrunksState, options: TrunkScaleOptions, asked: Asked | None, now: float) -> tuple[int, Asked | None]:
    """Return (trunks there should be, the memory for the next call). `now` is in seconds of any clock.

    The number lies within min..max or is the one set by hand. While no trunk reports, nothing changes.
    """
    if state.wanted is not None:
        return state.wanted, None
    present = _within(state, state.replicas)
    if state.reporting == 0:
        return present, None
    needed = _within(state, fitting(state, options))
    fewer = _within(state, max(fitting(state, options, DOWN_MARGIN), present - 1))
    direction = 1 if needed > present else -1 if fewer < present else 0
    if direction == 0:
        return present, None
    since = asked[1] if asked is not None and asked[0] == direction else now
    if direction > 0:
        return (needed, None) if now - since >= options.up_after_s else (present, (1, since))
    if state.reporting < present or now - since < options.down_after_s:  # one that starts may be about to help
        return present, (-1, since)
    return fewer, (-1, now)


def _within(state: TrunksState, replicas: int) -> int:
    return max(state.min_replicas, min(state.max_replicas, replicas))
