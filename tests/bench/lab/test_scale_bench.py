"""What the scaling bench makes of answers and phases; the scaling itself needs a server of its own."""

from __future__ import annotations

import pytest

from moe_ray.bench.lab.scale import CALM, DOWN, UP, Phase, phase_rows, steps_ms
from moe_ray.bench.lab.storm import StormAnswer


def steady(start: float, end: float, step: float) -> StormAnswer:
    count = round((end - start) / step)
    return StormAnswer(0, start, ["x"] * count, [start + step * i for i in range(count)])


def test_a_gap_belongs_to_the_phase_in_which_it_ends() -> None:
    answer = StormAnswer(0, 0.0, list("abc"), [0.9, 1.1, 2.5])
    assert steps_ms([answer], 0.0, 1.0) == [], "the wait for a first token is no step"
    assert steps_ms([answer], 1.0, 2.0) == [pytest.approx(200)]
    assert steps_ms([answer], 2.0, 3.0) == [pytest.approx(1400)]


def test_ratios_are_to_the_unchanged_phase_of_the_same_cycle() -> None:
    answers, phases, at = [], [], 0.0
    for slow in (1.0, 3.0):  # the machine is three times slower in the second cycle
        for name, factor in ((CALM, 1.0), (UP, 2.0), (DOWN, 1.0)):
            answers.append(steady(at, at + 8.0, 0.02 * slow * factor))
            phases.append(Phase(name, at, at + 8.0, None if name == CALM else 3.0))
            at += 10.0
    calm, up, down = phase_rows(answers, phases)
    assert [row["phase"] for row in (calm, up, down)] == [CALM, UP, DOWN]
    assert (calm["p50_ratio"], calm["p99_ratio"], calm["done_s"]) == (1.0, 1.0, None)
    assert (up["p50_ratio"], up["p99_ratio"]) == (pytest.approx(2.0), pytest.approx(2.0))
    assert (down["p99_ratio"], down["done_s"], down["times"]) == (pytest.approx(1.0), 3.0, 2)
