"""What a replica has counted since its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A snapshot of a replica's counters since its start."""

    calls: int
    batches: int
    """Forward passes; fewer than calls where several were computed together."""
    rows: int
    busy_s: float
    queue_s: float
    """Waiting of all calls together, each from its arrival to its start."""
    queued_rows: int
    weight_bytes: int
    cancelled: int
    """Calls that were taken back before they began."""
