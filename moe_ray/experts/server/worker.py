"""The replica's side of an expert call: checks it, computes it, counts it. Knows rows only."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moe_ray.core import ExpertCall, ExpertKey, ExpertReply, ReplicaLoad
from moe_ray.errors import (
    AdapterNotHeld,
    CallCancelled,
    CallRefused,
    ExpertFailed,
    KernelsUnavailable,
    ReplicaBusy,
)
from moe_ray.experts.server.device_turns import DeviceTurns
from moe_ray.experts.server.load_counters import KeyLoad
from moe_ray.experts.server.worker_stats import WorkerStats
from moe_ray.model.compute.base import FFN
from moe_ray.model.compute.compute import Compute
from moe_ray.model.expert import ExpertFFN, joined_runs
from moe_ray.native.host import Host, HostEntry

if TYPE_CHECKING:
    import torch

    from moe_ray.model.lora.adapter_file import Adapter

logger = logging.getLogger(__name__)

MAX_BATCHED_ROWS: Final = 1024
"""Rows that calls computed together may have; from a few hundred on a batch costs what its parts do."""
MAX_QUEUED_ROWS: Final = 65_536
"""Rows that wait or compute, beyond which further calls are not accepted: 512 MiB of a Mixtral's in bfloat16."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A call whose thread waits until it has been computed along with another, or until it is its turn."""

    call: ExpertCall
    arrived: float
    wake: threading.Lock = field(default_factory=threading.Lock)
    """Held while there is something to wait for."""
    started: float = 0.0
    ended: float = 0.0
    rows: torch.Tensor | None = None
    error: Exception | None = None


class ExpertWorker:
    """Computes on one device, one batch at a time; `forward` may be called from many threads at once.

    Calls of the same layer that wait together (from several trunks) are computed as one batch: reading the weights,
    not multiplying by them, is what a small call costs.
    """

    def __init__(
        self,
        ffn: ExpertFFN,
        hidden_size: int,
        compute: Compute,
        to_come: Iterable[ExpertKey] = (),
        max_batched_rows: int = MAX_BATCHED_ROWS,
        max_queued_rows: int = MAX_QUEUED_ROWS,
        native_dir: Path | None = None,
        waits: bool = True,
    ) -> None:
        """Serve what `ffn` holds; `to_come` are the keys that will be added. `waits`: as `DeviceTurns` has it.

        `native_dir`: where the library of the native host is built and kept; None: sockets are answered through the
        interpreter.
        """
        self._ffn, self._hidden_size = ffn, hidden_size
        self.compute, self._max_batched_rows, self._max_queued_rows = compute, max_batched_rows, max_queued_rows
        self._state = threading.Lock()
        self._device = DeviceTurns(compute, hidden_size, waits)
        self._computing = False
        self._waiting: list[_Waiting] = []
        self._queued_rows = self._batches = self._cancelled = 0
        self._loads = dict.fromkeys((*ffn.keys, *to_come), KeyLoad())
        self.native = None if native_dir is None else self._host(native_dir)
        """Answers sockets without the interpreter, torch's computing excepted; what it does is counted here too."""

    @property
    def keys(self) -> frozenset[ExpertKey]:
        """What is served now; callable from any thread."""
        return self._ffn.keys

    def add(self, key: ExpertKey, ffn: FFN) -> None:
        """Serve one more key, of those to come, while calls for others are answered. From one thread at a time."""
        if self.native is not None:
            self.native.add(*key, self._entry(ffn))
        self._ffn.add(key, ffn)

    def add_adapter(self, adapter: Adapter) -> None:
        """Let calls name an adapter, once its parts of all keys are read. From one thread at a time.

        Raises `AdapterError`, and then holds none of it.
        """
        try:
            for key in sorted(self.keys):
                if adapter.adapts(*key):
                    self._ffn.add_adapter(key, adapter.adapter_id, adapter.expert_part(*key))
                    if self.native is not None:
                        ffn = self._ffn[key]
                        handle = ffn.adapter_handle(adapter.adapter_id)
                        self.native.add_adapter(*key, adapter.adapter_id, handle, ffn)
        except BaseException:
            self.remove_adapter(adapter.adapter_id)
            raise

    def remove_adapter(self, adapter_id: int) -> None:
        """Refuse calls that name an adapter from now on, and wait for those that came before. Idempotent."""
        for key in self.keys:
            if self.native is not None:
                self.native.remove_adapter(*key, adapter_id)
            self._ffn.remove_adapter(key, adapter_id)

    def buffers(self, key: ExpertKey) -> list[memoryview]:
        """The bytes of one key's weights, which must not be written to. Raises `KeyError` where it is not served."""
        return self._ffn.buffers(key)

    def _host(self, native_dir: Path) -> Host | None:
        spread = self.compute.backend.experts == "native"
        try:
            sizes = (self._max_batched_rows, spread, self._max_queued_rows)
            host = Host(native_dir, self._hidden_size, self.compute.dtype, *sizes)
        except KernelsUnavailable as error:
            logger.warning("sockets are answered through the interpreter: %s", error)
            return None
        for key in self._ffn.keys:
            host.add(*key, self._entry(self._ffn[key]))
        return host

    def _entry(self, ffn: FFN) -> HostEntry:
        entry = ffn.entry()
        if entry is not None:
            return entry
        from moe_ray.model.compute.torch.hosted import tensor_entry

        return tensor_entry(partial(self._device.fill, ffn), self.compute.torch_dtype)

    def forward(self, call: ExpertCall) -> ExpertReply:
        """Compute one call.

        Raises `CallRefused` on a call that this replica does not accept, `ReplicaBusy` on one that it does not accept
        now, `ExpertFailed` if it cannot compute it,
        `CallCancelled` if the trunk has cancelled it.
        """
        self._check(call)
        mine = _Waiting(call, time.perf_counter())
        rows = call.rows.shape[0]
        with self._state:
            if self._queued_rows and self._queued_rows + rows > self._max_queued_rows:
                raise ReplicaBusy(f"{self._queued_rows} rows are queued, {self._max_queued_rows} are accepted")
            self._queued_rows += rows
            self._waiting.append(mine)
            if self._computing:
                mine.wake.acquire()
            self._computing = True
        with mine.wake:
            pass
        if not mine.ended:
            try:
                self._have_turn(mine)
            finally:
                self._next()
        with self._state:
            queued = self._queued_rows
        if mine.rows is None:
            raise ExpertFailed(f"layer {call.layer} expert {call.expert}: {mine.error}") from mine.error
        load = ReplicaLoad(queued, int(1e6 * (mine.ended - mine.started)), int(1e6 * (mine.started - mine.arrived)))
        return ExpertReply(call.call_id, mine.rows, load)

    def _have_turn(self, mine: _Waiting) -> None:
        """Compute a call, and those that fit into a batch with it.

        Turns come in the order of arrival: then all experts serve the trunks in the same order, and none waits for the
        last of its experts longer than it must. Going by layer or by size of the batch was slower (`bench trunks`).
        """
        if mine.call.taken_back is None or not mine.call.taken_back():
            self._run(self._take(mine))
            return
        with self._state:
            self._waiting.remove(mine)
            self._queued_rows -= mine.call.rows.shape[0]
            self._cancelled += 1
        raise CallCancelled(f"layer {mine.call.layer} expert {mine.call.expert}: taken back before it began")

    def _next(self) -> None:
        with self._state:
            self._computing = bool(self._waiting)
            if self._waiting:
                self._waiting[0].wake.release()

    def _take(self, first: _Waiting) -> list[_Waiting]:
        """Take `first`, and the calls that fit into a batch with it, off the queue."""
        with self._state:
            batch, rows = [first], first.call.rows.shape[0]
            for other in self._waiting:
                same = (other.call.layer, other.call.expert) == (first.call.layer, first.call.expert)
                same = same and other.call.rows.device == first.call.rows.device
                if other is not first and same and rows + other.call.rows.shape[0] <= self._max_batched_rows:
                    batch.append(other)
                    rows += other.call.rows.shape[0]
            self._waiting = [other for other in self._waiting if other not in batch]
        return batch

    def _run(self, batch: list[_Waiting]) -> None:
        import torch

        call, started = batch[0].call, time.perf_counter()
        calls = [waiting.call for waiting in batch]
        error: Exception | None = None
        outputs: Sequence[torch.Tensor | None] = [None] * len(batch)
        try:
            rows = call.rows if len(calls) == 1 else torch.cat([c.rows for c in calls])
            weights = call.weights if len(calls) == 1 else torch.cat([c.weights for c in calls])
            adapters = joined_runs([(c.adapters, c.rows.shape[0]) for c in calls])
            out = self._device.forward(self._ffn[call.layer, call.expert], rows, weights, adapters)
            out = out.to(call.rows.device)
            outputs = (out,) if len(calls) == 1 else torch.split(out, [c.rows.shape[0] for c in calls])
        except RuntimeError as failure:  # torch: out of memory, a lost device
            error = failure
        finally:  # whatever else it raises, no call waits for ever
            self._end(batch, started, outputs, error)

    def _end(
        self, batch: list[_Waiting], started: float, outputs: Sequence[torch.Tensor | None], error: Exception | None
    ) -> None:
        ended, first = time.perf_counter(), batch[0].call
        waited = sum(started - waiting.arrived for waiting in batch)
        done = KeyLoad(len(batch), sum(w.call.rows.shape[0] for w in batch), ended - started, waited)
        with self._state:
            self._batches += 1
            self._queued_rows -= done.rows
            self._loads[first.layer, first.expert] += done
            for waiting, output in zip(batch, outputs, strict=True):
                waiting.started, waiting.ended, waiting.rows, waiting.error = started, ended, output, error
                if waiting is not batch[0]:
                    waiting.wake.release()

    def stats(self) -> WorkerStats:
        """A snapshot; callable from any thread."""
        with self._state:
            load, batches, queued = sum(self._loads.values(), KeyLoad()), self._batches, self._queued_rows
            cancelled = self._cancelled
        if self.native is not None:
            hosted = self.native.stats()
            load += KeyLoad(hosted.calls, hosted.rows, hosted.busy_ns / 1e9, hosted.queue_ns / 1e9)
            batches, queued = batches + hosted.batches, queued + hosted.queued_rows
            cancelled += hosted.cancelled
        return WorkerStats(
            load.calls, batches, load.rows, load.busy_s, load.queue_s, queued, self._ffn.nbytes, cancelled
        )

    def key_loads(self) -> dict[ExpertKey, KeyLoad]:
        """Counters since the start of each (layer, expert) held or to come; callable from any thread."""
        with self._state:
            loads = dict(self._loads)
        for key in self.native.key_stats() if self.native is not None else ():
            loads[key.layer, key.expert] += KeyLoad(key.calls, key.rows, key.busy_ns / 1e9, key.queue_ns / 1e9)
        return loads

    def _check(self, call: ExpertCall) -> None:
        import torch

        if (call.layer, call.expert) not in self._ffn.keys:
            raise CallRefused(f"layer {call.layer} expert {call.expert} is not held by this replica")
        if call.rows.ndim != 2 or call.rows.shape[0] < 1 or call.rows.shape[1] != self._hidden_size:
            raise CallRefused(f"rows have shape {list(call.rows.shape)}, expected [at least 1, {self._hidden_size}]")
        if call.rows.dtype != self.compute.torch_dtype:
            raise CallRefused(f"rows are {call.rows.dtype}, this replica computes in torch.{self.compute.dtype}")
        if call.weights.shape != (call.rows.shape[0],) or call.weights.dtype != torch.float32:
            raise CallRefused(f"weights must be float32 [{call.rows.shape[0]}], got {list(call.weights.shape)}")
        for run in call.adapters:
            if run.adapter_id and not self._ffn.has_adapter((call.layer, call.expert), run.adapter_id):
                raise AdapterNotHeld(f"adapter {run.adapter_id} is not held by this replica")
