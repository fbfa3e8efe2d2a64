"""One expert call as the trunk sees it: rows of one layer for one expert, the replicas that have it, its state.

queued ──sent──► sent ──hedged──► hedged ──answered──► done
  ▲               │ │                │
  └────fault──────┘ └──answered──► done      (a fault of one of two attempts: hedged → sent)
queued ──given up──► failed          queued ──left out──► lost
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from moe_ray.core import AdapterRows
from moe_ray.errors import TransportError
from moe_ray.experts.client.replica import Replica
from moe_ray.transport.base import Replies


class CallState(enum.Enum):
    """Where a call stands."""

    QUEUED = "queued"
    """No replica has it: it was not sent yet, or each attempt has failed so far."""
    SENT = "sent"
    """One replica has it."""
    HEDGED = "hedged"
    """Two replicas have it; the first answer counts."""
    DONE = "done"
    """Its rows are here."""
    FAILED = "failed"
    """It ended in an error, and so does its layer."""
    LOST = "lost"
    """Its expert is left out of its tokens (`on_loss: renormalise`)."""


class CallEvent(enum.Enum):
    """What happens to a call."""

    SENT = "sent"
    HEDGED = "hedged"
    ANSWERED = "answered"
    FAULT = "fault"
    """One attempt ended without rows."""
    GIVEN_UP = "given up"
    LEFT_OUT = "left out"


_TRANSITIONS: Final[Mapping[tuple[CallState, CallEvent], CallState]] = {
    (CallState.QUEUED, CallEvent.SENT): CallState.SENT,
    (CallState.QUEUED, CallEvent.GIVEN_UP): CallState.FAILED,
    (CallState.QUEUED, CallEvent.LEFT_OUT): CallState.LOST,
    (CallState.SENT, CallEvent.HEDGED): CallState.HEDGED,
    (CallState.SENT, CallEvent.ANSWERED): CallState.DONE,
    (CallState.SENT, CallEvent.FAULT): CallState.QUEUED,
    (CallState.HEDGED, CallEvent.ANSWERED): CallState.DONE,
    (CallState.HEDGED, CallEvent.FAULT): CallState.SENT,
}
ENDED: Final = frozenset({CallState.DONE, CallState.FAILED, CallState.LOST})


def next_state(state: CallState, event: CallEvent) -> CallState:
    """The state of a call after `event`. Asserts that the event can happen in `state`."""
    after = _TRANSITIONS.get((state, event))
    assert after is not None, f"a call that is {state.value} cannot be {event.value}"
    return after


def ids_of(runs: Sequence[AdapterRows]) -> frozenset[int]:
    """The adapters of runs: what a replica must hold besides the key."""
    return frozenset(run.adapter_id for run in runs if run.adapter_id) if runs else frozenset()


@dataclass(slots=True, eq=False)
class Attempt:
    """A call sent to one replica, and where the reply arrives."""

    replica: Replica
    replies: Replies
    index: int
    """Of the call among those of `replies`."""
    sent_at: float
    """Monotonic seconds."""
    hedge: bool = False
    """It is the second of two."""


@dataclass(slots=True, eq=False)
class Call:
    """Rows [start, start + count) of a layer's routed rows, for one expert. Owned by the dispatcher's thread."""

    layer: int
    expert: int
    start: int
    count: int
    adapters: tuple[AdapterRows, ...] = ()
    """Runs of its rows, by adapter; (): none has one."""
    state: CallState = CallState.QUEUED
    attempts: list[Attempt] = field(default_factory=list)
    """In flight now: one, or two while it is hedged."""
    retried: bool = False
    """An attempt has failed."""
    retry_at: float = 0.0
    """Monotonic seconds; it is not sent again before."""
    deadline: float | None = None
    """Monotonic seconds until which a replica is waited for; set when the call is first found without one."""
    refusals: dict[str, TransportError] = field(default_factory=dict)
    """Replica id → the error that it answered: a call is not sent there again."""
    answer: Attempt | None = None
    """The attempt that was answered."""

    @property
    def row_range(self) -> slice:
        """Where its rows are among those of the layer."""
        return slice(self.start, self.start + self.count)

    def apply(self, event: CallEvent) -> None:
        """Change the state as `next_state` says."""
        self.state = next_state(self.state, event)
