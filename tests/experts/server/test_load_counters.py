"""Windows over a replica's counters: data in, data out, by a clock of the test's own."""

from __future__ import annotations

import itertools
import threading

import pytest

from moe_ray.experts.server import load_counters as load
from moe_ray.experts.server.load_counters import KeyLoad, LoadSample, LoadSampler, LoadWindow, between, window

Loads = dict[tuple[int, int], KeyLoad]


class Worker:
    """Counters that the test moves, and a clock."""

    def __init__(self) -> None:
        self.at_s = 100.0
        self.loads: Loads = {(layer, 5): KeyLoad() for layer in range(3)}

    def key_loads(self) -> Loads:
        return dict(self.loads)

    def clock(self) -> float:
        return self.at_s

    def work(self, layer: int, *load: float) -> None:
        self.loads[layer, 5] += KeyLoad(*load)  # type: ignore[arg-type]


def test_a_sample_adds_up_what_a_replica_holds() -> None:
    loads = {(2, 5): KeyLoad(1, 4, 0.5, 0.25), (0, 5): KeyLoad(2, 8, 1.0, 0.5), (2, 6): KeyLoad(4, 16, 2.0, 1.0)}
    rows = {(2, 5): 4, (0, 5): 8, (2, 6): 16}
    assert LoadSample.of(3.0, loads) == LoadSample(3.0, KeyLoad(7, 28, 3.5, 1.75), rows)
    assert LoadSample.of(3.0, {}) == LoadSample(3.0, KeyLoad(), {})


def test_rates_are_differences_over_the_time_between() -> None:
    first = LoadSample(10.0, KeyLoad(5, 50, 1.0, 0.5), {(0, 5): 20, (1, 5): 30})
    last = LoadSample(14.0, KeyLoad(15, 90, 2.0, 0.53), {(0, 5): 40, (1, 5): 50})
    got = between(first, last)
    assert (got.seconds, got.busy, got.rows_per_s, got.calls_per_s) == (4.0, 0.25, 10.0, 2.5)
    assert (got.rows_per_call, got.rows_per_layer) == (4.0, {5: (20, 20)})
    assert got.queue_ms == pytest.approx(3.0)


def test_rows_are_told_by_expert_and_layer() -> None:
    first = LoadSample(0.0, KeyLoad(), {(0, 3): 1, (2, 3): 2, (1, 5): 4})
    last = LoadSample(1.0, KeyLoad(), {(0, 3): 11, (2, 3): 2, (1, 5): 40})
    assert between(first, last).rows_per_layer == {3: (10, 0, 0), 5: (0, 36, 0)}


def test_nothing_done_and_no_time_passed_are_zeros() -> None:
    idle = LoadSample(10.0, KeyLoad(5, 50, 1.0, 0.5), {(0, 5): 50})
    assert between(idle, LoadSample(12.0, idle.total, idle.rows)) == LoadWindow(2.0, 0, 0, 0, 0, 0, {5: (0,)})
    assert between(idle, idle) == LoadWindow(0.0, 0, 0, 0, 0, 0, {5: (0,)})
    nobody = LoadSample(10.0, KeyLoad(), {})
    assert between(nobody, nobody).rows_per_layer == {}


def test_a_long_call_that_ends_in_a_short_window_is_not_more_than_busy() -> None:
    first, last = LoadSample(0.0, KeyLoad(), {(0, 5): 0}), LoadSample(1.0, KeyLoad(1, 900, 7.0, 0.0), {(0, 5): 900})
    assert between(first, last).busy == 1.0


@pytest.mark.parametrize(("seconds", "begins"), [(0, 9), (1, 8), (2.5, 6), (9, 0), (60, 0)])
def test_a_window_begins_at_the_newest_sample_that_is_old_enough(seconds: float, begins: int) -> None:
    samples = [LoadSample(float(t), KeyLoad(t, t * t), {(0, 5): t * t}) for t in range(10)]
    got = window(samples, seconds)
    assert got.seconds == 9 - begins
    assert got.rows_per_layer == {5: (81 - begins**2,)}


def test_an_answer_goes_up_to_this_moment_and_leaves_no_trace() -> None:
    worker = Worker()
    sampler = LoadSampler(worker.key_loads, clock=worker.clock)
    assert sampler.window(10).seconds == 0
    for _ in range(2):
        worker.at_s += 2.0
        worker.work(1, 2, 10, 1.0, 0.004)
        got = sampler.window(10)
        assert got.busy == pytest.approx(0.5)
        assert got.rows_per_s == pytest.approx(5.0)
        assert got.queue_ms == pytest.approx(2.0)
    assert got.rows_per_layer == {5: (0, 20, 0)}
    assert got.seconds == 4.0


def test_a_minute_is_kept_and_no_more() -> None:
    worker = Worker()
    sampler = LoadSampler(worker.key_loads, clock=worker.clock)
    for second in range(100):
        worker.at_s += 1.0
        worker.work(second % 3, 1, 2)
        sampler.sample()
    assert sampler.window(1000).seconds == 60
    assert sum(sampler.window(1000).rows_per_layer[5]) == 2 * 60
    assert sampler.window(10).rows_per_s == 2.0


def test_the_thread_samples_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PERIOD_S", 0.001)
    worker, seen, enough = Worker(), list[tuple[LoadSample, LoadWindow]](), threading.Event()

    def read() -> Loads:
        worker.at_s += 1.0
        worker.work(0, 1, 3)
        return worker.key_loads()

    def report(sample: LoadSample, made: LoadWindow) -> None:
        seen.append((sample, made))
        if len(seen) == 3:
            enough.set()

    sampler = LoadSampler(read, report, worker.clock)
    sampler.start()
    assert enough.wait(20)
    sampler.close()
    for (earlier, _), (later, made) in itertools.pairwise(seen):
        assert later.at_s - earlier.at_s >= load.REPORT_S
        assert made.rows_per_s == pytest.approx(3.0)
        assert made.seconds <= load.WINDOW_S + 1
