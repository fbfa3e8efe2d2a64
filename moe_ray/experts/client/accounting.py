"""What each replica owes, and what its answers teach: outstanding rows, costs, slowdown, quarantine."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Final

from moe_ray.core import ReplicaLoad
from moe_ray.errors import TransportError, WrongAnswer
from moe_ray.experts.client.cost_model import CallCosts
from moe_ray.experts.client.replica import Replica

logger = logging.getLogger(__name__)

LATE_SLOWDOWN: Final = 10.0
"""The slowdown, at least, that is assumed of a replica when a call to it was late."""


@dataclass(slots=True)
class Counters:
    """What a dispatcher has done since its start."""

    calls: int = 0
    splits: int = 0
    """Batches of one expert that several replicas shared."""
    retries: int = 0
    """Calls that were sent again after a fault."""
    hedges: int = 0
    """Calls that were sent a second time because they were late."""
    hedge_wins: int = 0
    """Second calls that were answered first."""
    cancelled: int = 0
    """Attempts that were cancelled because the other of two was answered first."""
    quarantines: int = 0


@dataclass(slots=True, eq=False)
class Accounting:
    """Settles attempts. Each attempt is settled once: answered, faulted or released. One thread."""

    counters: Counters = field(default_factory=Counters)
    costs: CallCosts = field(default_factory=CallCosts)

    def sent(self, replica: Replica, rows: int) -> None:
        """Count `rows` as outstanding at `replica`."""
        replica.outstanding_rows += rows
        replica.calls += 1
        self.counters.calls += 1

    def answered(self, replica: Replica, rows: int, load: ReplicaLoad) -> None:
        """Settle an attempt that was answered correctly, and learn from the load that the replica reported."""
        replica.outstanding_rows -= rows
        now = time.monotonic()
        replica.note_answer(load, now)
        replica.slowdown.observe(self.costs.observe(rows, load.compute_us), now)

    def faulted(self, replica: Replica, rows: int, error: TransportError) -> None:
        """Settle an attempt that ended in `error`. Only a wrong answer quarantines the replica."""
        replica.outstanding_rows -= rows
        if isinstance(error, WrongAnswer):
            seconds = replica.quarantine(time.monotonic())
            self.counters.quarantines += 1
            logger.warning("expert replica %s is quarantined for %g s: %s", replica.replica_id, seconds, error)

    def released(self, replica: Replica, rows: int) -> None:
        """Settle an attempt whose reply is not waited for any more."""
        replica.outstanding_rows -= rows

    def late(self, replica: Replica, rows: int, waited_s: float) -> None:
        """Learn that a call of `rows` rows has not been answered after `waited_s`."""
        usual_us = self.costs.expect(rows)
        multiple = max(LATE_SLOWDOWN, 1e6 * waited_s / usual_us) if usual_us else LATE_SLOWDOWN
        replica.slowdown.observe(multiple, time.monotonic())
