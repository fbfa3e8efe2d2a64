"""Selection of replicas, sharing of rows, costs, slowdown, hedging: data in, data out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from moe_ray.experts.client.cost_model import SLOWDOWN_HALF_LIFE_S, CallCosts, SlowdownEstimate
from moe_ray.experts.client.hedging import UNKNOWN_S, HedgePolicy
from moe_ray.experts.client.selection import CALL_US, MIN_UNMEASURED_ROWS, select_replica, split_rows


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

    def slowdown_at(self, now: float) -> float:
        return self.slow


def test_least_outstanding_then_least_used() -> None:
    a, b, c, d = Fake("a", 7), Fake("b", 2, calls=9), Fake("c", 2, calls=3), Fake("d", usable=False)
    assert select_replica([a, b, c, d], 1, 0.0) is c
    assert select_replica([a, b, c, d], 1, 0.0, {"c"}) is b
    assert select_replica([a, b, c, d], 1, 0.0, {"b", "c"}) is a
    assert select_replica([a, b, c, d], 1, 0.0, {"a", "b", "c"}) is None
    assert select_replica([d], 1, 0.0) is None
    assert select_replica([], 1, 0.0) is None


def test_the_same_node_is_preferred_among_equals_only() -> None:
    near, far = Fake("near", calls=100), Fake("far", node_id="there")
    assert select_replica([far, near], 10, 0.0, node_id="here") is near
    near.outstanding_rows = 2  # 12 against 10 rows: near enough
    assert select_replica([far, near], 10, 0.0, node_id="here") is near
    near.outstanding_rows = 5
    assert select_replica([far, near], 10, 0.0, node_id="here") is far


def test_slow_replicas_are_given_less() -> None:
    slow, quick = Fake("slow", slow=3.0), Fake("quick")
    assert select_replica([slow, quick], 10, 0.0) is quick
    quick.outstanding_rows = 15
    assert select_replica([slow, quick], 10, 0.0) is quick
    quick.outstanding_rows = 25
    assert select_replica([slow, quick], 10, 0.0) is slow


def test_a_quarantined_replica_is_the_last_resort() -> None:
    bad, good = Fake("bad", quarantined=True), Fake("good", outstanding_rows=1000)
    assert select_replica([bad, good], 1, 0.0) is good
    good.usable = False
    assert select_replica([bad, good], 1, 0.0) is bad


def test_of_many_two_are_drawn() -> None:
    many, draw = [Fake(str(i), outstanding_rows=100 if i else 0) for i in range(10)], random.Random(1)
    chosen = Counter((select_replica(many, 1, 0.0, draw=draw) or many[0]).replica_id for _ in range(1000))
    assert 130 < chosen["0"] < 270, "the idle one wins whenever it is drawn: a fifth of the time"
    assert len(chosen) == 10


def memory_bound(fixed_us: float, per_row_us: float) -> CallCosts:
    costs = CallCosts()
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
    few = CallCosts()
    few.observe(2, 500)
    assert few.expect(1) == 500
    assert few.expect(2000) is None
    assert CallCosts().expect(1) is None


def test_only_batches_bound_by_computing_are_split() -> None:
    costs = memory_bound(1000, 10)
    assert split_rows(8, [1, 1], costs) == [8, 0]
    assert split_rows(24, [1, 1], costs) == [24, 0]
    assert split_rows(400, [1, 1], costs) == [200, 200]
    assert split_rows(900, [1, 1, 1], costs) == [300, 300, 300]
    assert split_rows(900, [1.0, 2.0], costs) == [600, 300], "in proportion to speed"
    assert split_rows(1, [1, 1], costs) == [1, 0]
    small = memory_bound(0, CALL_US / 100)
    assert split_rows(50, [1, 1], small) == [50, 0], "a second call would cost more than it saves"


def test_unmeasured_batches_are_split_when_large() -> None:
    assert split_rows(2 * MIN_UNMEASURED_ROWS - 1, [1, 1], CallCosts()) == [2 * MIN_UNMEASURED_ROWS - 1, 0]
    assert split_rows(2 * MIN_UNMEASURED_ROWS, [1, 1, 1], CallCosts()) == [MIN_UNMEASURED_ROWS, MIN_UNMEASURED_ROWS, 0]


def test_a_slowdown_decays() -> None:
    slowdown = SlowdownEstimate()
    for _ in range(30):
        slowdown.observe(4.0, 100.0)
    assert slowdown.read(100.0) == pytest.approx(4.0, rel=0.02)
    assert slowdown.read(100.0 + SLOWDOWN_HALF_LIFE_S) == pytest.approx(2.5, rel=0.02)
    assert slowdown.read(1000.0) == pytest.approx(1.0)


def test_late_is_a_percentile_and_second_calls_have_a_budget() -> None:
    hedging = HedgePolicy(least_s=0.001)
    assert hedging.limit_s(8) == UNKNOWN_S
    for i in range(101):
        hedging.record_latency(8, 0.2 if i % 50 == 0 else 0.010, 1)
    assert hedging.limit_s(8) == pytest.approx(0.020), "two in a hundred stalls do not move it"
    assert hedging.limit_s(500) == UNKNOWN_S, "of calls of such a size nothing is known"
    assert hedging.limit_s(8000) == pytest.approx(10.24), "but the time it takes may grow with the rows"
    spent = sum(hedging.take() for _ in range(100))
    assert spent == 6, "four to begin with, and two for a hundred calls"
    for _ in range(51):
        hedging.record_latency(8, 0.01, 1)
    assert hedging.take()
    assert not hedging.take()
