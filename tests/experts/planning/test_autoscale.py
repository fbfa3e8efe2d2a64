"""The scaling policy: what is seen in, replicas out."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from moe_ray.experts.planning.autoscale import MOST_GROWTH, AutoscaleOptions, ExpertState, decide, expected_growth

AT_ONCE = AutoscaleOptions(target_busy=0.5, up_after_s=0, down_after_s=0)


def one(replicas: int, busy: float, *, least: int = 1, most: int = 8, options: AutoscaleOptions = AT_ONCE) -> int:
    """The number decided for an expert that is alone."""
    state = ExpertState(replicas, busy, min_replicas=least, max_replicas=most)
    return decide({3: state}, options, {}, 100.0)[0][3]


@pytest.mark.parametrize(
    ("replicas", "busy", "target"),
    [
        (1, 0.5, 1),  # just at the target
        (1, 0.54, 1),  # within the tolerance
        (1, 0.56, 2),
        (1, 1.0, 2),
        (2, 1.0, 2),
        (2, 2.0, 4),  # all at once, as many as are missing
        (4, 1.9, 4),  # 3.8 implied: a part of a replica is not taken away
        (4, 1.5, 3),
        (4, 0.1, 3),  # one at a time
        (1, 0.0, 1),
        (20, 10.9, 20),  # 21.8 implied is within a tenth
    ],
)
def test_busy_over_target_is_what_it_takes(replicas: int, busy: float, target: int) -> None:
    assert one(replicas, busy, most=64) == target


def test_rounding_makes_no_replica() -> None:
    assert one(1, 0.6, options=AutoscaleOptions(target_busy=0.2, up_after_s=0)) == 3


@pytest.mark.parametrize(
    ("replicas", "busy", "least", "most", "target"),
    [(1, 1.0, 1, 1, 1), (2, 2.0, 1, 3, 3), (1, 0.0, 2, 4, 2), (6, 6.0, 1, 4, 4), (2, 0.0, 2, 4, 2)],
)
def test_never_out_of_bounds(replicas: int, busy: float, least: int, most: int, target: int) -> None:
    assert one(replicas, busy, least=least, most=most) == target


class Course:
    """One expert over time, its replicas always as decided."""

    def __init__(self, replicas: int, options: AutoscaleOptions) -> None:
        self.replicas, self.options = replicas, options
        self.memory: Mapping[int, tuple[int, float]] = {}

    def at(self, now: float, busy: float) -> int:
        state = ExpertState(self.replicas, busy, max_replicas=8)
        targets, self.memory = decide({0: state}, self.options, self.memory, now)
        self.replicas = targets[0]
        return self.replicas


def test_demand_must_hold_before_more_are_started() -> None:
    course = Course(1, AutoscaleOptions(target_busy=0.5, up_after_s=3, down_after_s=30))
    assert [course.at(t, 1.0) for t in (0, 1, 2.9)] == [1, 1, 1]
    assert course.at(3, 1.0) == 2


def test_a_lull_starts_the_wait_anew() -> None:
    course = Course(1, AutoscaleOptions(target_busy=0.5, up_after_s=3))
    assert [course.at(t, busy) for t, busy in ((0, 1.0), (2, 0.5), (3, 1.0), (5, 1.0), (6, 1.0))] == [1, 1, 1, 1, 2]


def test_each_step_down_waits_anew() -> None:
    course = Course(4, AutoscaleOptions(target_busy=0.5, down_after_s=30))
    seen = [course.at(t, 0.1) for t in (0, 29, 30, 31, 59, 60, 90, 120, 500)]
    assert seen == [4, 4, 3, 3, 3, 2, 1, 1, 1]


def test_turning_around_forgets_the_other_direction() -> None:
    course = Course(2, AutoscaleOptions(target_busy=0.5, up_after_s=10, down_after_s=10))
    assert [course.at(t, busy) for t, busy in ((0, 0.1), (9, 2.0), (11, 0.1), (18, 0.1), (20, 0.1))] == [2, 2, 2, 2, 2]
    assert course.at(21, 0.1) == 1


def test_replicas_on_their_way_are_waited_for() -> None:
    course = Course(1, AutoscaleOptions(target_busy=0.5, up_after_s=0, down_after_s=30))
    assert [course.at(t, 1.0) for t in range(20)] == [2] * 20, "one computes, the other is still starting"


def test_what_waits_for_one_expert_is_asked_of_all_next() -> None:
    states = {e: ExpertState(1, busy, max_replicas=64) for e, busy in enumerate((1.0, 0.6, 0.2))}
    assert decide(states, AT_ONCE, {}, 0)[0] == {0: 2, 1: 2, 2: 1}, "nobody waits: it is just busy"
    waited_for = {**states, 0: ExpertState(1, 1.0, waiting=2.0, max_replicas=64)}
    assert expected_growth(waited_for.values()) == 3
    assert decide(waited_for, AT_ONCE, {}, 0)[0] == {0: 6, 1: 4, 2: 2}
    waited_for[0] = ExpertState(1, 1.0, waiting=50.0, max_replicas=64)
    assert expected_growth(waited_for.values()) == MOST_GROWTH
    assert decide(waited_for, AT_ONCE, {}, 0)[0] == {0: 8, 1: 5, 2: 2}


@pytest.mark.parametrize(
    ("state", "growth"),
    [
        (ExpertState(1, 0.85, waiting=3.0, max_replicas=64), 1),  # two calls that came at once
        (ExpertState(2, 1.0, waiting=3.0, max_replicas=64), 1),  # the second one is on its way
        (ExpertState(2, 2.0, waiting=3.0, max_replicas=64), 2.5),
        (ExpertState(1, 0.95, waiting=0.0, max_replicas=64), 1),
        (ExpertState(1, 0.0, waiting=0.0, max_replicas=64), 1),
        (ExpertState(1, 1.0, waiting=9.0, max_replicas=2), 2),  # no more than it may have
        (ExpertState(1, 1.0, waiting=9.0, max_replicas=1), 1),
        (ExpertState(1, 1.0, waiting=9.0, max_replicas=64, wanted=3), 3),
    ],
)
def test_growth_is_what_waits_where_more_can_be_had(state: ExpertState, growth: float) -> None:
    assert expected_growth([state]) == pytest.approx(growth)


def test_an_expert_that_cannot_grow_keeps_the_others_from_it() -> None:
    states = {
        0: ExpertState(1, 1.0, waiting=9.0, max_replicas=64),
        1: ExpertState(1, 0.5, max_replicas=1),
        2: ExpertState(1, 0.4, max_replicas=64),
    }
    assert expected_growth(states.values()) == 2, "then expert 1 is saturated"
    assert decide(states, AT_ONCE, {}, 0)[0] == {0: 4, 1: 1, 2: 2}


def hot(*busy: float, replicas: int = 1, most: int = 8) -> dict[int, ExpertState]:
    return {expert: ExpertState(replicas, b, max_replicas=most) for expert, b in enumerate(busy)}


def total(most: int) -> AutoscaleOptions:
    return AutoscaleOptions(target_busy=0.25, up_after_s=0, down_after_s=0, max_total=most)


def test_the_hottest_get_what_there_is() -> None:
    assert decide(hot(0.5, 1.0, 0.9), total(3), {}, 0)[0] == {0: 1, 1: 1, 2: 1}
    assert decide(hot(0.5, 1.0, 0.9), total(4), {}, 0)[0] == {0: 1, 1: 2, 2: 1}
    assert decide(hot(0.5, 1.0, 0.9), total(5), {}, 0)[0] == {0: 1, 1: 2, 2: 2}
    # Two each: 0.5 and 0.45 a replica for the hot ones, so the third expert's 0.5 is as much; the lower number wins.
    assert decide(hot(0.5, 1.0, 0.9), total(6), {}, 0)[0] == {0: 2, 1: 2, 2: 2}
    assert decide(hot(0.5, 1.0, 0.9), total(100), {}, 0)[0] == {0: 2, 1: 4, 2: 4}


def test_of_equally_busy_ones_the_longer_queue() -> None:
    states = {e: ExpertState(1, 1.0, waiting, max_replicas=4) for e, waiting in ((0, 1.0), (1, 9.0), (2, 0.0))}
    assert decide(states, total(4), {}, 0)[0] == {0: 1, 1: 2, 2: 1}


def test_a_budget_below_the_minima_leaves_the_minima() -> None:
    states = {0: ExpertState(2, 2.0, min_replicas=2, max_replicas=4), 1: ExpertState(1, 1.0, max_replicas=4)}
    assert decide(states, total(1), {}, 0)[0] == {0: 2, 1: 1}


def test_a_replica_moves_to_who_needs_it_more() -> None:
    options = AutoscaleOptions(target_busy=0.5, up_after_s=0, down_after_s=1000, max_total=3)
    states = {0: ExpertState(2, 0.3, max_replicas=4), 1: ExpertState(1, 1.0, max_replicas=4)}
    assert decide(states, options, {}, 0)[0] == {0: 1, 1: 2}


def test_a_replica_does_not_move_for_a_little() -> None:
    options = AutoscaleOptions(target_busy=0.25, up_after_s=0, max_total=3)
    for first, second in ((0.90, 0.91), (0.91, 0.90), (0.9, 0.93)):
        states = {0: ExpertState(2, first, max_replicas=4), 1: ExpertState(1, second, max_replicas=4)}
        assert decide(states, options, {}, 0)[0] == {0: 2, 1: 1}


def test_a_replica_moves_only_after_a_while() -> None:
    options = AutoscaleOptions(target_busy=0.25, up_after_s=3, down_after_s=1000, max_total=3)
    states = {0: ExpertState(2, 0.6, max_replicas=4), 1: ExpertState(1, 1.0, max_replicas=4)}
    lull = {0: ExpertState(2, 0.98, max_replicas=4), 1: ExpertState(1, 1.0, max_replicas=4)}
    memory = {1: (1, -3.0)}
    seen = []
    for now, round_ in ((0, states), (3, states), (5, lull), (6, states), (8, states), (9, states)):
        targets, memory = decide(round_, options, memory, now)
        seen.append(targets)
    assert seen == [{0: 2, 1: 1}] * 1 + [{0: 1, 1: 2}] + [{0: 2, 1: 1}] * 3 + [{0: 1, 1: 2}]


def test_for_a_small_imbalance_a_replica_moves_only_if_it_lasts() -> None:
    options = AutoscaleOptions(target_busy=0.25, up_after_s=3, down_after_s=1000, max_total=3)
    states = {0: ExpertState(2, 0.9, max_replicas=4), 1: ExpertState(1, 1.0, max_replicas=4)}
    memory: Mapping[int, tuple[int, float]] = {1: (1, -3.0)}
    seen = []
    for now in (0, 3, 29, 30):
        targets, memory = decide(states, options, memory, now)
        seen.append(targets)
    assert seen == [{0: 2, 1: 1}] * 3 + [{0: 1, 1: 2}]


def test_a_smaller_budget_takes_half_at_a_time() -> None:
    assert decide(hot(6.0, replicas=7), total(2), {}, 0)[0] == {0: 4}


def test_numbers_set_by_hand_are_taken_as_they_are() -> None:
    states = {
        0: ExpertState(1, 0.0, max_replicas=1, wanted=5),
        1: ExpertState(4, 4.0, max_replicas=8, wanted=1),
        2: ExpertState(1, 1.0, max_replicas=8),
    }
    targets, memory = decide(states, AT_ONCE, {0: (1, 0.0), 1: (1, 0.0)}, 9)
    assert targets == {0: 5, 1: 1, 2: 2}
    assert memory == {2: (1, 9)}


def test_numbers_set_by_hand_come_out_of_the_budget_first() -> None:
    states = {0: ExpertState(1, 0.1, wanted=4), 1: ExpertState(1, 1.0, max_replicas=8)}
    assert decide(states, total(5), {}, 0)[0] == {0: 4, 1: 1}
    assert decide(states, total(7), {}, 0)[0] == {0: 4, 1: 3}
    assert decide(states, total(2), {}, 0)[0] == {0: 4, 1: 1}, "beyond the budget, too"


def test_whom_nobody_asks_for_is_as_it_was() -> None:
    assert decide({}, AT_ONCE, {4: (1, 0.0)}, 1) == ({}, {})


def test_ten_thousand_random_clusters() -> None:
    chance = random.Random(7)
    for _ in range(10_000):
        states = {}
        for expert in range(chance.randint(1, 8)):
            least = chance.randint(1, 3)
            most, replicas = least + chance.randint(0, 5), chance.randint(1, 8)
            wanted = chance.choice([None, None, None, chance.randint(1, 9)])
            busy, waiting = chance.random() * replicas, chance.choice([0.0, chance.random() * 50])
            states[expert] = ExpertState(replicas, busy, waiting, least, most, wanted)
        budget = chance.choice([None, chance.randint(1, 40)])
        options = AutoscaleOptions(0.6, 0.1, chance.choice([0, 3]), chance.choice([0, 30]), budget)
        memory = {e: (chance.choice([1, -1]), chance.random() * 60) for e in states if chance.random() < 0.5}
        targets, after = decide(states, options, memory, 60.0)
        assert decide(dict(reversed(states.items())), options, memory, 60.0) == (targets, after)
        assert targets.keys() == states.keys()
        present = 0
        for expert, state in states.items():
            if state.wanted is not None:
                assert targets[expert] == state.wanted
                present += state.wanted
                continue
            assert state.min_replicas <= targets[expert] <= state.max_replicas
            assert targets[expert] >= min(state.replicas, state.max_replicas) // 2
            present += max(state.min_replicas, min(state.replicas, state.max_replicas))
        assert budget is None or sum(targets.values()) <= max(budget, present)
