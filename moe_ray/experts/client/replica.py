"""A linked replica as the dispatcher knows it: what it holds, what it has to do, how it has answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from moe_ray.core import ReplicaInfo, ReplicaLoad
from moe_ray.experts.client.cost_model import SlowdownEstimate
from moe_ray.transport.base import Link

QUARANTINE_S: Final = 10.0
"""After the first wrong answer; doubles with each further one in a row."""
MAX_QUARANTINE_S: Final = 300.0
FRESH_S: Final = 0.5
"""How long a replica's own report of its queue is used."""


def backlog_rows(outstanding: int, reported: int, report_age_s: float) -> int:
    """Rows that a replica has to compute first: those sent to it, or those of its own report while that is fresh."""
    return max(outstanding, reported if report_age_s < FRESH_S else 0)


@dataclass(slots=True, eq=False)
class Replica:
    """One linked replica. `info`, `link` and `retiring` belong to the replica table, the rest to the dispatcher."""

    info: ReplicaInfo
    link: Link
    outstanding_rows: int = 0
    """Rows in calls sent to it and not settled."""
    calls: int = 0
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    load_at: float = 0.0
    """When `load` arrived (monotonic seconds)."""
    retiring: bool = False
    """Gone from discovery while its link still works. It gets new calls only for keys that no other replica holds (its
    successor may still be loading), and is closed when it holds no such key and owes no reply."""
    slowdown: SlowdownEstimate = field(default_factory=SlowdownEstimate)
    wrong_answers: int = 0
    """In a row."""
    quarantined_until: float = 0.0
    """Monotonic seconds; until then it is called only where there is no other replica."""

    @property
    def replica_id(self) -> str:
        return self.info.replica_id

    @property
    def node_id(self) -> str:
        return self.info.node_id

    @property
    def usable(self) -> bool:
        return not self.link.broken

    def trusted(self, now: float) -> bool:
        return self.quarantined_until <= now

    def backlog(self, now: float) -> int:
        return backlog_rows(self.outstanding_rows, self.load.queued_rows, now - self.load_at)

    def slowdown_at(self, now: float) -> float:
        return self.slowdown.read(now)

    def note_answer(self, load: ReplicaLoad, now: float) -> None:
        """Note a correct answer and the load that it reported."""
        self.load = load
        self.load_at = now
        self.wrong_answers = 0

    def quarantine(self, now: float) -> float:
        """Note a wrong answer; return the seconds for which the replica is quarantined."""
        self.wrong_answers += 1
        seconds = min(QUARANTINE_S * 2 ** (self.wrong_answers - 1), MAX_QUARANTINE_S)
        self.quarantined_until = now + seconds
        return seconds
