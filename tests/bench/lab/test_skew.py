"""`bench skew`: its traffic and its clockwork as data; one tiny run of the real thing; one tiny simulation."""

from __future__ import annotations

import json
import random

import psutil
import pytest

from moe_ray.bench.lab.emulate import (
    Autoscaler,
    ReplicaSample,
    ServiceQueue,
    ServiceTime,
    busy_shares,
    even,
    max_over_mean,
    popularity,
    restored_after_s,
    row_shares,
    shifted,
)
from moe_ray.bench.lab.simulate import SimulationOptions, simulate
from moe_ray.bench.lab.skew import SkewOptions, curves, run_skew
from moe_ray.bench.report import as_json
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.autoscale import AutoscaleOptions

TINY = SkewOptions(
    num_experts=4,
    replicas=8,
    trunks=2,
    micro_batches=2,
    layers=2,
    tokens=16,
    service=ServiceTime(4000.0, 1000.0),
    skew=1.8,
    start_delay_s=0.1,
    up_after_s=0.2,
    settle_s=4.0,
    measure_s=2.0,
    simulation=None,
)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def test_shares_are_those_of_two_different_draws() -> None:
    weights = [4.0, 3.0, 2.0, 1.0]
    draw, rows = random.Random(0), [0] * 4
    for _ in range(20_000):
        first = draw.choices(range(4), weights)[0]
        second = draw.choices(range(4), [0 if e == first else w for e, w in enumerate(weights)])[0]
        rows[first] += 1
        rows[second] += 1
    assert row_shares(weights) == pytest.approx([count / 40_000 for count in rows], abs=0.01)
    assert row_shares([1.0] * 8) == pytest.approx([1 / 8] * 8)


@pytest.mark.parametrize(("experts", "skew"), [(8, 1.0), (8, 2.3), (64, 2.3), (4, 1.9)])
def test_the_hottest_expert_is_as_hot_as_asked(experts: int, skew: float) -> None:
    weights = popularity(experts, skew)
    assert weights == sorted(weights, reverse=True)
    assert max_over_mean(row_shares(weights)) == pytest.approx(skew, abs=1e-6)
    assert sorted(shifted(weights, 3), reverse=True) == weights
    assert shifted(weights, 3).index(weights[0]) in (3, 0 if skew == 1.0 else 3)


def test_a_queue_computes_one_call_at_a_time() -> None:
    queue = ServiceQueue()
    assert queue.take(1.0, 2.0) == 3.0
    assert queue.take(2.0, 2.0) == 5.0
    assert (queue.computed_s(4.0), queue.left_s(4.0)) == (3.0, 1.0)
    assert queue.take(10.0, 1.0) == 11.0
    assert (queue.computed_s(20.0), queue.left_s(20.0)) == (5.0, 0.0)
    assert ServiceTime(1000.0, 10.0).seconds(100) == pytest.approx(0.002)


def test_relief_is_from_the_fall_to_the_return() -> None:
    ends = [i / 10 for i in range(100)] + [10 + i / 2 for i in range(20)] + [20 + i / 10 for i in range(100)]
    assert restored_after_s(ends, 10.0, 30.0, 9.0, 2.0) == pytest.approx(9.8, abs=0.25)
    assert restored_after_s(ends, 10.0, 18.0, 9.0, 2.0) is None
    assert restored_after_s(ends, 21.0, 29.0, 9.0, 2.0) == 0.0


def test_the_window_tells_the_policy_who_was_busy() -> None:
    scaler = Autoscaler(AutoscaleOptions(up_after_s=0.0, max_total=3), 5.0, 8)
    planned = {0: 1, 1: 1}
    for now in (0.0, 1.0, 2.0):
        samples = {"a": ReplicaSample(0, 1.0 * now, 0), "b": ReplicaSample(1, 0.2 * now, 0)}
        wanted = scaler.wanted(now, samples, planned)
    assert wanted == {0: 2, 1: 1}
    late = {"a": ReplicaSample(0, 3.0, 0), "b": ReplicaSample(1, 0.5, 0), "c": ReplicaSample(0, 9.0, 0)}
    assert busy_shares(samples, late, 2.0) == pytest.approx([0.5, 0.05])


@pytest.mark.slow
def test_a_tiny_run_has_every_figure_and_scaling_helps() -> None:
    report = run_skew(TINY, silent)
    told = json.loads(as_json(report))
    cases = ["static", "scaled", "hot spot moved 1", "balanced", "stalls", "stalls, hedged"]
    assert [row["case"] for row in told["rows"]] == cases
    numbers = [
        *(
            f"{case}_{key}"
            for case in ("balanced", "static", "scaled", "moved")
            for key in ("tokens_per_s", "step_p50_ms")
        ),
        *(f"{case}_step_p99_ms" for case in ("balanced", "static", "scaled", "unhedged", "hedged")),
        "max_over_mean_busy_before",
        "max_over_mean_busy_after",
        "emulation_late_mean_us",
        "emulation_late_p99_us",
    ]
    assert all(told[key] > 0 for key in numbers)
    assert told["max_over_mean_rows"] == pytest.approx(1.8)
    assert {"relief_s", "hedged_extra_calls_share"} <= told.keys()
    assert told["scaled_tokens_per_s"] > 1.2 * told["static_tokens_per_s"]
    assert told["rows"][1]["replicas"] > told["rows"][0]["replicas"] == 4
    assert told["rows"][3]["replicas"] == told["rows"][2]["replicas"]
    assert len(curves(report).rows) >= 8
    assert not psutil.Process().children()


def test_a_simulation_is_repeatable_and_scaling_helps() -> None:
    options = SimulationOptions(
        num_experts=8,
        trunks=4,
        layers=2,
        tokens=32,
        scale=AutoscaleOptions(up_after_s=1.0, max_total=16),
        settle_s=20.0,
        measure_s=5.0,
    )
    rows = simulate(options)
    assert rows == simulate(options)
    speeds = {row["case"]: float(row["tokens_per_s"] or 0) for row in rows}
    assert list(speeds) == ["static", "scaled", "hot spot moved", "balanced"]
    assert speeds["scaled"] > 1.2 * speeds["static"]
    assert rows[-1]["replicas"] == rows[-2]["replicas"]
    assert even(3, 7) == {0: 3, 1: 2, 2: 2}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (SkewOptions(num_experts=1), "--experts"),
        (SkewOptions(replicas=7), "--replicas"),
        (SkewOptions(skew=4.0), "--skew: must be at least 1 and below 4"),
        (SkewOptions(trunks=0), "--trunks"),
        (SkewOptions(start_delay_s=-1.0), "--start-delay"),
    ],
)
def test_wrong_options_are_named(options: SkewOptions, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run_skew(options, silent)
