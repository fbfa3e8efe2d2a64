"""The replica's side of an expert call: checks it, computes it, counts it. Knows rows only."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch

from moe_ray.core import ExpertCall, ExpertKey, ExpertReply, ReplicaLoad
from moe_ray.errors import ExpertFailed, ProtocolError
from moe_ray.model.expert import ExpertFFN


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A snapshot of a replica's counters since its start."""

    calls: int
    rows: int
    busy_s: float
    queued_rows: int
    weight_bytes: int


class ExpertWorker:
    """Computes calls one at a time on one device; `forward` may be called from many threads at once."""

    def __init__(self, ffn: ExpertFFN, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._ffn, self._hidden_size, self._dtype, self._device = ffn, hidden_size, dtype, device
        self._compute = threading.Lock()
        self._counters = threading.Lock()
        self._calls = self._rows = self._queued_rows = 0
        self._busy_s = 0.0

    @property
    def keys(self) -> frozenset[ExpertKey]:
        return self._ffn.keys

    def forward(self, call: ExpertCall) -> ExpertReply:
        """Compute one call. Raises `ProtocolError` on a call this replica must refuse, `ExpertFailed` if it cannot."""
        self._check(call)
        count, arrived = call.rows.shape[0], time.perf_counter()
        with self._counters:
            self._queued_rows += count
        started = arrived
        try:
            with self._compute:
                started = time.perf_counter()
                rows = self._ffn.forward(
                    (call.layer, call.expert), call.rows.to(self._device), call.weights.to(self._device)
                ).to(call.rows.device)
        except RuntimeError as error:  # torch: out of memory, a lost device
            raise ExpertFailed(f"layer {call.layer} expert {call.expert}: {error}") from error
        finally:
            ended = time.perf_counter()
            with self._counters:
                self._queued_rows -= count
                self._calls += 1
                self._rows += count
                self._busy_s += ended - started
                queued = self._queued_rows
        load = ReplicaLoad(queued, int(1e6 * (ended - started)), int(1e6 * (started - arrived)))
        return ExpertReply(call.call_id, rows, load)

    def stats(self) -> WorkerStats:
        """A snapshot; callable from any thread."""
        with self._counters:
            return WorkerStats(self._calls, self._rows, self._busy_s, self._queued_rows, self._ffn.nbytes)

    def _check(self, call: ExpertCall) -> None:
        if (call.layer, call.expert) not in self._ffn.weights:
            raise ProtocolError(f"layer {call.layer} expert {call.expert} is not held by this replica")
        if call.rows.ndim != 2 or call.rows.shape[0] < 1 or call.rows.shape[1] != self._hidden_size:
            raise ProtocolError(f"rows have shape {list(call.rows.shape)}, expected [at least 1, {self._hidden_size}]")
        if call.rows.dtype != self._dtype:
            raise ProtocolError(f"rows are {call.rows.dtype}, this replica computes in {self._dtype}")
        if call.weights.shape != (call.rows.shape[0],) or call.weights.dtype != torch.float32:
            raise ProtocolError(f"weights must be float32 [{call.rows.shape[0]}], got {list(call.weights.shape)}")
