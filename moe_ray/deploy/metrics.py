"""What Ray exports to Prometheus of experts and trunks; Ray puts `ray_` before each name."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Final, ParamSpec

from ray.util.metrics import Counter, Gauge

from moe_ray.core import EngineStats, ExpertKey
from moe_ray.experts.server.load_counters import REPORT_S, LoadSample, LoadWindow
from moe_ray.experts.server.worker_stats import WorkerStats

if TYPE_CHECKING:
    from moe_ray.experts.client.accounting import Counters  # needs torch, which experts may do without

logger = logging.getLogger(__name__)

P = ParamSpec("P")

_REPLICA = ("deployment", "replica")


class ExpertMetrics:
    """The metrics of one replica. One thread calls `report`, every few seconds: nothing is recorded per call."""

    def __init__(self, deployment: str, replica_id: str, stats: Callable[[], WorkerStats]) -> None:
        self._tags = {"deployment": deployment, "replica": replica_id}
        self._stats = stats
        self._reported: Mapping[ExpertKey, int] = {}
        tags = (*_REPLICA, "expert", "layer")
        self._rows = Counter("moe_ray_expert_rows_total", "Rows computed, by expert and layer.", tags)
        self._busy = Gauge("moe_ray_expert_busy_fraction", "Fraction of the last 10 s spent computing.", _REPLICA)
        self._wait = Gauge("moe_ray_expert_queue_wait_ms", "Mean wait of a call in the last 10 s.", _REPLICA)
        self._per_call = Gauge("moe_ray_expert_rows_per_call", "Mean rows of a call in the last 10 s.", _REPLICA)
        self._queued = Gauge("moe_ray_expert_queued_rows", "Rows waiting or being computed.", _REPLICA)

    def report(self, sample: LoadSample, window: LoadWindow) -> None:
        """Record the counters of this moment and the last seconds' rates."""
        for (layer, expert), rows in sample.rows.items():
            if (more := rows - self._reported.get((layer, expert), 0)) > 0:
                self._rows.inc(more, {**self._tags, "expert": str(expert), "layer": str(layer)})
        self._reported = sample.rows
        self._busy.set(window.busy, self._tags)
        self._wait.set(window.queue_ms, self._tags)
        self._per_call.set(window.rows_per_call, self._tags)
        self._queued.set(self._stats().queued_rows, self._tags)


POOL_COUNTERS: Final = {
    "calls": "Calls to experts.",
    "splits": "Batches of one expert that were shared among replicas.",
    "retries": "Calls that were sent again after they had failed.",
    "hedges": "Calls that were sent a second time because they were late.",
    "hedge_wins": "Second calls that were answered first.",
    "cancelled": "Calls that were taken back because the other of two was answered first.",
    "quarantines": "Replicas set aside for a while because of a wrong answer.",
}
"""Field of `Counters` → help."""

ENGINE_COUNTERS: Final = {
    "prompt_tokens": "Tokens computed as prompt, those computed again after preemption included.",
    "generated_tokens": "Tokens generated.",
    "prefix_query_tokens": "Tokens looked up in the prefix cache.",
    "prefix_hit_tokens": "Tokens found in the prefix cache.",
    "preemptions": "Sequences preempted for want of KV blocks.",
    "steps": "Batches computed.",
    "drafts": "Runs of guessed tokens.",
    "draft_tokens": "Guessed tokens that were verified.",
    "accepted_draft_tokens": "Guessed tokens that came true.",
    "degraded_tokens": "Tokens computed without one of their experts.",
    "swap_stored_bytes": "Bytes of KV blocks copied to host memory.",
    "swap_loaded_bytes": "Bytes of KV blocks copied back from there.",
    "swap_hit_tokens": "Tokens loaded from host memory instead of computed.",
    "swap_evicted_blocks": "KV blocks that host memory had no more room for.",
    "swap_load_seconds": "Time of steps that went into copies to the KV cache, from host memory or read from disk.",
    "disk_written_bytes": "Bytes of KV blocks written to disk.",
    "disk_loaded_bytes": "Bytes of KV blocks loaded from disk.",
    "disk_hit_tokens": "Tokens loaded from disk instead of computed.",
    "disk_read_seconds": "Time that reading KV blocks from disk took, beside the steps.",
    "disk_removed_files": "KV blocks removed from disk for room.",
    "disk_damaged_files": "Damaged files of KV blocks that were removed from disk.",
    "disk_dropped_blocks": "KV blocks that were not written to disk at once, because its queue was full.",
    "disk_failures": "Reads and writes of KV blocks that the disk refused.",
    "tier_declined_tokens": "Tokens computed although host memory or the disk has them: as measured, that is faster.",
}
"""Field of `EngineStats` that only grows → help."""

ENGINE_GAUGES: Final = {
    "num_running": ("running", "Sequences being computed."),
    "num_waiting": ("waiting", "Sequences waiting to be admitted."),
    "kv_blocks_total": ("kv_blocks", "Blocks of the KV cache."),
    "kv_blocks_free": ("kv_blocks_free", "Blocks of the KV cache that no sequence holds."),
    "swap_bytes": ("swap_bytes", "Bytes of KV blocks in host memory."),
    "disk_bytes": ("disk_bytes", "Bytes of files in the directory of KV blocks, as far as is known."),
    "adapters": ("adapters", "LoRA adapters that the trunk holds."),
}
"""The other fields of `EngineStats` → name and help."""


class TrunkMetrics:
    """The metrics of one trunk: its engine (`moe_ray_trunk_…`) and its calls to experts (`moe_ray_pool_…`).

    One thread calls `report`, every few seconds. A counter that is still 0 is not exported.
    """

    def __init__(self, replica_id: str, engine: Callable[[], EngineStats], pool: Counters) -> None:
        self._tags, keys = {"trunk": replica_id}, ("trunk",)
        self._engine, self._pool = engine, pool
        self._pool_counters = {
            each.name: Counter(f"moe_ray_pool_{each.name}_total", POOL_COUNTERS.get(each.name, ""), keys)
            for each in fields(pool)
        }
        self._engine_counters = {
            each.name: Counter(f"moe_ray_trunk_{each.name}_total", ENGINE_COUNTERS.get(each.name, ""), keys)
            for each in fields(EngineStats)
            if each.name not in ENGINE_GAUGES
        }
        self._gauges = {
            field: Gauge(f"moe_ray_trunk_{name}", says, keys) for field, (name, says) in ENGINE_GAUGES.items()
        }
        self._used = Gauge("moe_ray_trunk_kv_blocks_used", "Blocks of the KV cache that sequences hold.", keys)
        self._reported: dict[Counter, float] = {}

    def report(self) -> None:
        """Record what the counters grew by since the last time, and the state of this moment."""
        stats = self._engine()
        for source, counters in ((self._pool, self._pool_counters), (stats, self._engine_counters)):
            for name, counter in counters.items():
                value = getattr(source, name)
                if more := value - self._reported.get(counter, 0):
                    counter.inc(more, self._tags)
                self._reported[counter] = value
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name), self._tags)
        self._used.set(stats.kv_blocks_total - stats.kv_blocks_free, self._tags)


def surviving(report: Callable[P, None]) -> Callable[P, None]:
    """`report`, except that a failure is logged instead of raised: the loop that calls it goes on."""

    def logged(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            report(*args, **kwargs)
        except Exception:
            logger.exception("metrics could not be reported")

    return logged


class Reporter:
    """Calls `reports` every few seconds on a thread of its own until `close`, and then once more.

    A report that fails is logged; the next one is made nevertheless.
    """

    def __init__(self, *reports: Callable[[], None], period_s: float = REPORT_S) -> None:
        self._reports, self._period_s = [surviving(report) for report in reports], period_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Report a last time and end the thread. Idempotent."""
        self._closed.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._closed.wait(self._period_s):
            self._report_all()
        self._report_all()

    def _report_all(self) -> None:
        for report in self._reports:
            report()
