"""What Serve's controller does with our policy, without a controller: reports in, replicas out."""

from __future__ import annotations

import inspect
import threading
import time
from dataclasses import dataclass

import pytest
from ray.exceptions import RpcError
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from moe_ray.config import load_config
from moe_ray.deploy.replica_targets import (
    DECIDE_EVERY_S,
    Scaler,
    autoscaling_config,
    measured,
    wait_until_quiet,
    within_serve,
)
from moe_ray.experts.planning.autoscale import AutoscaleOptions, ExpertState

CONTEXT_FIELDS = list(inspect.signature(AutoscalingContext).parameters)


@dataclass(frozen=True)
class Point:
    timestamp: float
    value: float


def series(*points: tuple[float, float]) -> list[Point]:
    return [Point(*point) for point in points]


def test_busy_is_the_share_of_the_window_summed_over_replicas() -> None:
    reports = {
        "busy_s": {"a": series((10, 100.0), (12, 101.0), (20, 105.0)), "b": series((18, 0.0), (20, 2.1))},
    }
    assert measured(reports) == (0.5 + 1.0, 0)


def test_calls_that_are_computed_together_wait_as_one() -> None:
    reports = {
        "busy_s": {"a": series((10, 0.0), (20, 10.0)), "b": series((10, 3.0), (20, 8.0)), "young": series((20, 1.0))},
        "queue_s": {"a": series((10, 5.0), (20, 45.0)), "b": series((10, 0.0), (20, 5.0)), "young": series((20, 9.0))},
        "calls": {"a": series((10, 100), (20, 500)), "b": series((10, 7), (20, 17))},
        "batches": {"a": series((10, 50), (20, 150)), "b": series((10, 7), (20, 17))},
    }
    assert measured(reports) == (1.0 + 0.5, 40 / 10 / 4 + 5 / 10)


def test_who_reported_once_or_restarted_counts_as_idle() -> None:
    assert measured({"busy_s": {"young": series((1, 5.0)), "again": series((1, 9.0), (2, 0.0)), "mute": []}}) == (0, 0)
    assert measured({}) == (0, 0)


class Store:
    """The numbers set by hand."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.away = False
        self.reads = 0

    def __call__(self, experts: object) -> dict[int, int]:
        self.reads += 1
        if self.away:
            raise RpcError("the GCS is away")
        return dict(self.numbers)


OPTIONS = AutoscaleOptions(target_busy=0.5, up_after_s=0, down_after_s=0, max_total=3)


def tick(
    scaler: Scaler, now: float, *busy: float, present: list[int], options: AutoscaleOptions = OPTIONS
) -> list[int]:
    """One round of Serve's loop: asks for every expert, then acts; `present` becomes what was decided."""
    states = [ExpertState(now_there, b, max_replicas=8) for now_there, b in zip(present, busy, strict=True)]
    present[:] = [scaler.replicas(e, now, lambda s=state: s, options) for e, state in enumerate(states)]
    return list(present)


def test_one_budget_for_all_and_no_ping_pong() -> None:
    scaler, present = Scaler(Store()), [1, 1]
    tick(scaler, 0.0, 0.4, 0.4, present=present)
    seen = [tick(scaler, 0.1 * step, 1.0, 0.9, present=present) for step in range(1, 100)]
    assert all(sum(numbers) <= 3 for numbers in seen)
    assert seen[-1] == [2, 1]
    assert [numbers for i, numbers in enumerate(seen) if i and numbers != seen[i - 1]] == [[2, 1]]


def test_steps_down_are_taken_once() -> None:
    scaler, present = Scaler(Store()), [3, 3]
    options = AutoscaleOptions(target_busy=0.5, up_after_s=1, down_after_s=10, max_total=9)
    seen = [tick(scaler, 0.1 * step, 0.0, 0.0, present=present, options=options) for step in range(300)]
    assert [numbers for i, numbers in enumerate(seen) if i and numbers != seen[i - 1]] == [[2, 2], [1, 1]]


def test_the_hand_is_obeyed_within_a_second_and_read_seldom() -> None:
    store, present = Store(), [1, 1]
    scaler = Scaler(store)
    tick(scaler, 0.0, 0.0, 0.0, present=present)
    store.numbers, store.reads = {1: 4}, 0
    seen = [tick(scaler, 0.1 * step, 0.0, 0.0, present=present) for step in range(1, 11)]
    assert seen[-1] == [1, 4]
    assert store.reads <= 1 / DECIDE_EVERY_S + 1


def test_while_the_store_is_away_what_was_set_holds() -> None:
    store, present = Store(), [1, 1]
    scaler = Scaler(store)
    store.numbers = {0: 3}
    tick(scaler, 0.0, 0.0, 0.0, present=present)
    tick(scaler, 1.0, 0.0, 0.0, present=present)
    store.away = True
    assert tick(scaler, 2.0, 0.0, 0.0, present=present) == [3, 1]
    store.away, store.numbers = False, {}
    tick(scaler, 3.0, 0.0, 0.0, present=present)
    tick(scaler, 4.0, 0.0, 0.0, present=present)
    assert tick(scaler, 5.0, 0.0, 0.0, present=present) == [1, 1]


@pytest.mark.parametrize("enabled", [False, True])
def test_serve_takes_the_configuration(enabled: bool) -> None:
    flags = {
        "experts": {
            "num_replicas": 2,
            "max_replicas": 6,
            "overrides": {1: {"num_replicas": 3, "min_replicas": 2, "max_replicas": 80}},
            "autoscale": {"enabled": enabled, "max_total_replicas": 20},
        }
    }
    experts = load_config(flags).experts
    for expert, (start, bounds, most) in {0: (2, (1, 6), 64), 1: (3, (2, 80), 80)}.items():
        config = AutoscalingConfig(**autoscaling_config(experts, expert))
        assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, start, most)
        kwargs = config.policy.policy_kwargs
        assert (kwargs["min_replicas"], kwargs["max_replicas"]) == (bounds if enabled else (start, start))
        assert kwargs["options"]["max_total"] == (20 if enabled else None)
        policy = config.policy.get_policy()(**kwargs)
        assert type(policy).__name__ == "ExpertPolicy"


@pytest.mark.parametrize(
    ("serve", "bounds"),
    [((1, 64), (2, 6)), ((3, 64), (3, 6)), ((1, 4), (2, 4)), ((8, 64), (8, 8)), ((None, None), (2, 6))],
)
def test_the_policy_keeps_within_what_serve_is_told_later(
    serve: tuple[int | None, int | None], bounds: tuple[int, int]
) -> None:
    context = AutoscalingContext(**dict.fromkeys(CONTEXT_FIELDS))
    context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas = serve
    assert within_serve((2, 6), context) == bounds


def test_a_replica_that_is_still_called_lingers() -> None:
    calls, stop = [0], threading.Event()

    def call() -> None:
        while not stop.wait(0.02):
            calls[0] += 1

    caller = threading.Thread(target=call)
    caller.start()
    threading.Timer(0.4, stop.set).start()
    started = time.monotonic()
    wait_until_quiet(lambda: calls[0], at_most_s=10, quiet_s=0.2)
    assert 0.55 < time.monotonic() - started < 2
    caller.join()


def test_it_does_not_linger_for_ever() -> None:
    count = iter(range(1_000_000))
    started = time.monotonic()
    wait_until_quiet(lambda: next(count), at_most_s=0.3, quiet_s=0.2)
    assert 0.25 < time.monotonic() - started < 1
