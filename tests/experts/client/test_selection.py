"""Who gets the rows, how they are shared, and when a call is late: data in, data out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from moe_ray.experts.client.selection import (
    CALL_US,
    PACE_HALF_LIFE_S,
    UNKNOWN_S,
    UNMEASURED_ROWS,
    Costs,
    Lateness,
    Pace,
    choose,
    split,
)


@dataclass
class Fake:
    replica_id: str
    outstanding_rows: int = 0
    calls: int = 0
    node_id: str = "here"
    usable: bool = True
    quarantined: bool = False
    slow: float = 1.0

    def trusted(self, now: float) -> bool:
        return not self.quarantined

    def backlog(self, now: float) -> int:
        return self.outstanding_rows

    def pace(self, now: float) -> float:
        return self.slow


def test_least_outstanding_then_least_used() -> None:
    a, b, c, d = Fake("a", 7), Fake("b", 2, calls=9), Fake("c", 2, calls=3), Fake("d", usable=False)
    assert choose([a, b, c, d], 1, 0.0) is c
    assert choose([a, b, c, d], 1, 0.0, {"c"}) is b
    assert choose([a, b, c, d], 1, 0.0, {"b", "c"}) is a
    assert choose([a, b, c, d], 1, 0.0, {"a", "b", "c"}) is None
    assert choose([d], 1, 0.0) is None
    assert choose([], 1, 0.0) is None


def test_the_same_node_is_preferred_among_equals_only() -> None:
    near, far = Fake("near", calls=100), Fake("far", node_id="there")
    assert choose([far, near], 10, 0.0, node_id="here") is near
    near.outstanding_rows = 2  # 12 against 10 rows: near enough
    assert choose([far, near], 10, 0.0, node_id="here") is near
    near.outstanding_rows = 5
    assert choose([far, near], 10, 0.0, node_id="here") is far


def test_slow_replicas_are_given_less() -> None:
    slow, quick = Fake("slow", slow=3.0), Fake("quick")
    assert choose([slow, quick], 10, 0.0) is quick
    quick.outstanding_rows = 15
    assert choose([slow, quick], 10, 0.0) is quick
    quick.outstanding_rows = 25
    assert choose([slow, quick], 10, 0.0) is slow


def test_who_gave_unusable_answers_is_the_last_resort() -> None:
    bad, good = Fake("bad", quarantined=True), Fake("good", outstanding_rows=1000)
    assert choose([bad, good], 1, 0.0) is good
    good.usable = False
    assert choose([bad, good], 1, 0.0) is bad


def test_of_many_two_are_drawn() -> None:
    many, draw = [Fake(str(i), outstanding_rows=100 if i else 0) for i in range(10)], random.Random(1)
    chosen = Counter((choose(many, 1, 0.0, draw=draw) or many[0]).replica_id for _ in range(1000))
    assert 130 < chosen["0"] < 270, "the idle one wins whenever it is drawn: a fifth of the time"
    assert len(chosen) == 10


def memory_bound(fixed_us: float, per_row_us: float) -> Costs:
    costs = Costs()
    for bucket in range(11):
        for _ in range(200):
            costs.observe(2**bucket + 2**bucket // 2, fixed_us + per_row_us * (2**bucket + 2**bucket // 2))
    return costs


def test_costs_are_learnt() -> None:
    costs = memory_bound(1000, 10)
    for rows in (3, 24, 100, 384, 1000):
        assert costs.expect(rows) == pytest.approx(1000 + 10 * rows, rel=0.05)
    assert costs.expect(4000) == pytest.approx(41_000, rel=0.3), "more than ever seen: grows with the rows"
    assert costs.observe(100, 100 * 2000) == pytest.approx(100, rel=0.1)
    assert costs.expect(100) == pytest.approx(2000, rel=0.1), "one stall is not the usual"
    few = Costs()
    few.observe(2, 500)
    assert few.expect(1) == 500
    assert few.expect(2000) is None
    assert Costs().expect(1) is None


def test_only_batches_bound_by_computing_are_split() -> None:
    costs = memory_bound(1000, 10)
    assert split(8, [1, 1], costs) == [8, 0]
    assert split(24, [1, 1], costs) == [24, 0]
    assert split(400, [1, 1], costs) == [200, 200]
    assert split(900, [1, 1, 1], costs) == [300, 300, 300]
    assert split(900, [1.0, 2.0], costs) == [600, 300], "in proportion to speed"
    assert split(1, [1, 1], costs) == [1, 0]
    small = memory_bound(0, CALL_US / 100)
    assert split(50, [1, 1], small) == [50, 0], "a second call would cost more than it saves"


def test_unmeasured_batches_are_split_when_large() -> None:
    assert split(2 * UNMEASURED_ROWS - 1, [1, 1], Costs()) == [2 * UNMEASURED_ROWS - 1, 0]
    assert split(2 * UNMEASURED_ROWS, [1, 1, 1], Costs()) == [UNMEASURED_ROWS, UNMEASURED_ROWS, 0]


def test_pace_forgets() -> None:
    pace = Pace()
    for _ in range(30):
        pace.observe(4.0, 100.0)
    assert pace.read(100.0) == pytest.approx(4.0, rel=0.02)
    assert pace.read(100.0 + PACE_HALF_LIFE_S) == pytest.approx(2.5, rel=0.02)
    assert pace.read(1000.0) == pytest.approx(1.0)


def test_lateness_is_a_percentile_and_has_a_budget() -> None:
    late = Lateness(least_s=0.001)
    assert late.limit_s(8) == UNKNOWN_S
    for i in range(101):
        late.observe(8, 0.2 if i % 50 == 0 else 0.010, 1)
    assert late.limit_s(8) == pytest.approx(0.020), "two in a hundred stalls do not move it"
    assert late.limit_s(500) == UNKNOWN_S, "of calls of such a size nothing is known"
    assert late.limit_s(8000) == pytest.approx(10.24), "but the time it takes may grow with the rows"
    spent = sum(late.spend() for _ in range(100))
    assert spent == 6, "four to begin with, and two for a hundred calls"
    for _ in range(51):
        late.observe(8, 0.01, 1)
    assert late.spend()
    assert not late.spend()
