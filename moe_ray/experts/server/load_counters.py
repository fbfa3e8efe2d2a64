"""Load, measured where it is made: a replica's counters, sampled once a second, as rates over the last seconds."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moe_ray.core import ExpertKey

KEEP_S: Final = 60
PERIOD_S: Final = 1.0
REPORT_S: Final = 5.0
WINDOW_S: Final = 10.0
"""The stretch that people and metrics are shown."""


@dataclass(frozen=True, slots=True)
class KeyLoad:
    """What was done for one (layer, expert), or for several together."""

    calls: int = 0
    rows: int = 0
    busy_s: float = 0.0
    """Computing; calls that were computed as one batch count once."""
    queue_s: float = 0.0
    """Waiting of all calls together, each from its arrival to its start."""

    def __add__(self, other: KeyLoad) -> KeyLoad:
        return KeyLoad(
            self.calls + other.calls, self.rows + other.rows, self.busy_s + other.busy_s, self.queue_s + other.queue_s
        )


def by_expert(loads: Mapping[ExpertKey, KeyLoad], num_experts: int) -> dict[ExpertKey, KeyLoad]:
    """The loads by expert of the first model: what further models have of theirs counts where it is held."""
    found: dict[ExpertKey, KeyLoad] = {}
    for (layer, number), load in loads.items():
        key = (layer, number % num_experts)
        found[key] = found.get(key, KeyLoad()) + load
    return found


@dataclass(frozen=True, slots=True)
class LoadSample:
    """A replica's counters at one moment."""

    at_s: float
    total: KeyLoad
    rows: Mapping[ExpertKey, int]
    """Of every (layer, expert) held."""

    @staticmethod
    def of(at_s: float, loads: Mapping[ExpertKey, KeyLoad]) -> LoadSample:
        """Add up what a worker's `key_loads` says."""
        return LoadSample(at_s, sum(loads.values(), KeyLoad()), {key: load.rows for key, load in loads.items()})


@dataclass(frozen=True, slots=True)
class LoadWindow:
    """What a replica did over a stretch of time. A call counts when it ends."""

    seconds: float
    """How long the stretch really was: shorter than asked for when the replica is younger."""
    busy: float
    """Fraction of the time spent computing, 0 to 1."""
    rows_per_s: float
    calls_per_s: float
    rows_per_call: float
    queue_ms: float
    """Mean wait of a call, from its arrival to its start."""
    rows_per_layer: Mapping[int, tuple[int, ...]]
    """Expert → its rows of each layer, 0 where that layer is not held."""


def between(first: LoadSample, last: LoadSample) -> LoadWindow:
    """Return what happened from one sample to a later one; all zeros where no time passed."""
    seconds = max(last.at_s - first.at_s, 0.0)
    calls, rows = last.total.calls - first.total.calls, last.total.rows - first.total.rows
    busy_s, queue_s = last.total.busy_s - first.total.busy_s, last.total.queue_s - first.total.queue_s
    layers = 1 + max((layer for layer, _ in last.rows), default=-1)
    per_layer = {expert: [0] * layers for expert in sorted({expert for _, expert in last.rows})}
    for (layer, expert), count in last.rows.items():
        per_layer[expert][layer] = count - first.rows.get((layer, expert), 0)
    per_s = 1 / seconds if seconds else 0.0
    return LoadWindow(
        seconds=seconds,
        busy=min(busy_s * per_s, 1.0),  # a call that began before the stretch is counted whole
        rows_per_s=rows * per_s,
        calls_per_s=calls * per_s,
        rows_per_call=rows / calls if calls else 0.0,
        queue_ms=1000 * queue_s / calls if calls else 0.0,
        rows_per_layer={expert: tuple(counts) for expert, counts in per_layer.items()},
    )


def window(samples: Sequence[LoadSample], seconds: float) -> LoadWindow:
    """Return what happened in the last `seconds` before the newest of `samples` (oldest first, at least one).

    The stretch begins at the newest sample that is old enough, or at the oldest of all.
    """
    last = samples[-1]
    old_enough = (sample for sample in reversed(samples) if last.at_s - sample.at_s >= seconds)
    return between(next(old_enough, samples[0]), last)


class LoadSampler:
    """Samples a worker's counters once a second on a thread of its own and keeps the last minute. Thread-safe."""

    def __init__(
        self,
        read: Callable[[], Mapping[ExpertKey, KeyLoad]],
        report: Callable[[LoadSample, LoadWindow], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read` is a worker's `key_loads`; `report` is called on the thread every few seconds."""
        self._read, self._report, self._clock = read, report, clock
        self._lock = threading.Lock()
        self._samples: deque[LoadSample] = deque([self._now()], maxlen=int(KEEP_S / PERIOD_S) + 1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-load", daemon=True)

    def start(self) -> None:
        """Start sampling."""
        self._thread.start()

    def close(self) -> None:
        """Stop sampling; what is kept stays."""
        self._closed.set()

    def sample(self) -> LoadSample:
        """Keep the counters of this moment, and return them."""
        with self._lock:
            self._samples.append(self._now())
            return self._samples[-1]

    def window(self, seconds: float) -> LoadWindow:
        """What happened in the last `seconds`, up to this moment; of the last minute at most."""
        with self._lock:
            return window([*self._samples, self._now()], seconds)

    def _now(self) -> LoadSample:
        return LoadSample.of(self._clock(), self._read())

    def _run(self) -> None:
        reported = self._clock()
        while not self._closed.wait(PERIOD_S):
            sample = self.sample()
            if self._report is not None and sample.at_s - reported >= REPORT_S:
                reported = sample.at_s
                self._report(sample, self.window(WINDOW_S))
