"""What Ray exports to Prometheus of an expert's load; Ray puts `ray_` before each name."""

from __future__ import annotations

from collections.abc import Callable

from ray.util.metrics import Counter, Gauge

from moe_ray.experts.load import LoadWindow, Sample
from moe_ray.experts.worker import WorkerStats

_REPLICA = ("expert", "replica")


class ExpertMetrics:
    """The metrics of one replica. One thread calls `report`, every few seconds: nothing is recorded per call."""

    def __init__(self, expert: int, replica_id: str, stats: Callable[[], WorkerStats]) -> None:
        self._tags = {"expert": str(expert), "replica": replica_id}
        self._stats = stats
        self._reported: tuple[int, ...] = ()
        self._rows = Counter("moe_ray_expert_rows_total", "Rows computed, by layer.", (*_REPLICA, "layer"))
        self._busy = Gauge("moe_ray_expert_busy_fraction", "Fraction of the last 10 s spent computing.", _REPLICA)
        self._wait = Gauge("moe_ray_expert_queue_wait_ms", "Mean wait of a call in the last 10 s.", _REPLICA)
        self._per_call = Gauge("moe_ray_expert_rows_per_call", "Mean rows of a call in the last 10 s.", _REPLICA)
        self._queued = Gauge("moe_ray_expert_queued_rows", "Rows waiting or being computed.", _REPLICA)

    def report(self, sample: Sample, window: LoadWindow) -> None:
        """Record the counters of this moment and the last seconds' rates."""
        before = self._reported or (0,) * len(sample.rows_per_layer)
        for layer, (old, new) in enumerate(zip(before, sample.rows_per_layer, strict=True)):
            if new > old:
                self._rows.inc(new - old, {**self._tags, "layer": str(layer)})
        self._reported = sample.rows_per_layer
        self._busy.set(window.busy, self._tags)
        self._wait.set(window.queue_ms, self._tags)
        self._per_call.set(window.rows_per_call, self._tags)
        self._queued.set(self._stats().queued_rows, self._tags)
