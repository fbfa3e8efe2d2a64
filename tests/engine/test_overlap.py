"""The choice of micro-batches, against machines given as functions of (tokens, micro-batches)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from moe_ray.engine.overlap import CHOICES, KEEP, TRIALS, Overlap, best


def drive(
    overlap: Overlap, tokens: int, sequences: int, steps: int, seconds: Callable[[int], float], waiting: float = 0.5
) -> list[int]:
    chosen = []
    for _ in range(steps):
        m = overlap.choose(tokens, sequences)
        overlap.record(tokens, sequences, m, seconds(m), waiting * seconds(m))
        chosen.append(m)
    return chosen


@pytest.mark.parametrize("fastest", CHOICES)
def test_the_fastest_is_found_in_noise_and_kept(fastest: int) -> None:
    noise = random.Random(1)
    chosen = drive(Overlap(), 64, 8, 200, lambda m: (1.0 if m == fastest else 1.3) * noise.uniform(0.95, 1.05))
    assert set(chosen[: TRIALS * len(CHOICES)]) == set(CHOICES)
    assert set(chosen[TRIALS * len(CHOICES) :]) == {fastest}


def test_a_machine_that_changes_is_tried_again() -> None:
    overlap = Overlap()
    assert drive(overlap, 8, 8, KEEP, lambda m: float(m))[-1] == 1
    assert drive(overlap, 8, 8, KEEP, lambda m: 1.0 / m)[-1] == 3


def test_nothing_is_tried_where_nobody_waits() -> None:
    assert Counter(drive(Overlap(), 8, 8, 300, lambda m: 1.0 / m, waiting=0.02)) == {1: 298, 2: 1, 3: 1}


def test_a_single_sequence_cannot_be_cut() -> None:
    assert set(drive(Overlap(), 1, 1, 20, lambda m: 1.0 / m)) == {1}
    assert set(drive(Overlap(), 512, 1, 20, lambda m: 1.0 / m)) == {1}
    assert set(drive(Overlap(), 2, 2, 50, lambda m: 1.0 / m)) == {1, 2}


def test_kinds_of_steps_are_told_apart() -> None:
    overlap = Overlap()
    drive(overlap, 8, 8, 40, lambda m: float(m))
    drive(overlap, 512, 8, 40, lambda m: 1.0 / m)
    assert overlap.choose(8, 8) == 1
    assert overlap.choose(500, 8) == 3


def test_near_equal_means_one() -> None:
    assert best({1: [1.0], 2: [0.98], 3: [0.99]}) == 1
    assert best({1: [1.0], 2: [0.9], 3: [0.95]}) == 2
