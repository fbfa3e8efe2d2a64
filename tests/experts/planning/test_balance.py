"""What to replicate: load in, replicas and the predicted imbalance out, against numbers that a hand can check."""

from __future__ import annotations

import json
import random
import re

import pytest

from moe_ray.errors import ConfigError
from moe_ray.experts.planning.balance import imbalance, parse_load, propose, replicate, spread_layers

HOT = [[46, 22, 22, 10]] * 3  # max/mean 1.84
WANDERING = [[70, 10, 10, 10], [10, 70, 10, 10], [10, 10, 70, 10], [10, 10, 10, 70]]


def whole(expert: int, layers: int) -> frozenset[tuple[int, int]]:
    return frozenset((layer, expert) for layer in range(layers))


def test_imbalance_is_max_over_mean_weighted_by_rows() -> None:
    found = imbalance([[30, 10], [5, 5], [0, 0]])
    assert found.per_layer == (1.5, 1.0, 1.0)
    assert found.total == pytest.approx((40 * 1.5 + 10 * 1.0) / 50)


def test_replicas_share_rows_and_count_in_the_mean() -> None:
    found = imbalance([[30, 10]], (whole(0, 1),))
    assert found.per_layer == (15 / (40 / 3),)


def test_a_spare_computes_its_share_of_every_key_it_holds() -> None:
    spare = frozenset({(0, 0), (0, 1)})
    assert imbalance([[40, 20, 30]], (spare,)).per_layer == (30 * 4 / 90,)  # the spare: 20 + 10


def test_replicas_go_to_the_most_rows_per_replica() -> None:
    assert replicate(HOT, 4) == tuple(whole(expert, 3) for expert in (0, 0, 1, 2))
    assert replicate([[1, 1]], 3) == tuple(whole(expert, 1) for expert in (0, 1, 0))


def test_enough_replicas_and_no_more_are_proposed_unasked() -> None:
    skewed = [[23, 9, 9, 8, 8, 8, 8, 7]] * 2
    made = propose(skewed)
    assert made.before.total == pytest.approx(2.3)
    assert [made.replicas((0, expert)) for expert in range(8)] == [3, *[1] * 7]
    assert made.after.total == pytest.approx(9 / 8)
    assert propose([[25, 10, 10, 10, 10, 10]]).after.total <= 1.1
    assert propose([[10, 10]]).extras == ()


def test_the_best_number_is_proposed_where_none_is_enough() -> None:
    shares = [[0.288, 0.182, 0.133, 0.106, 0.088, 0.076, 0.067, 0.060]]
    made = propose(shares)
    tried = [propose(shares, count).after.total for count in range(9)]
    assert made.after.total == min(tried) > 1.1
    assert len(made.extras) == tried.index(min(tried))


def test_spares_hold_the_hot_layers_of_several_experts() -> None:
    (spare,) = spread_layers(WANDERING, 1, 4)
    assert spare == {(layer, layer) for layer in range(4)}
    one_card = imbalance(WANDERING, (spare,)).total
    assert one_card == pytest.approx(35 / 20)
    assert one_card < min(imbalance(WANDERING, (whole(expert, 4),)).total for expert in range(4))


def test_spares_are_never_fuller_than_asked_nor_hold_what_does_not_help() -> None:
    drawn = random.Random(0)
    for _ in range(50):
        rows = [[drawn.paretovariate(1.0) for _ in range(8)] for _ in range(6)]
        count, each = drawn.randint(0, 4), drawn.randint(1, 7)
        spares = spread_layers(rows, count, each)
        assert len(spares) == count
        assert all(len(keys) <= each for keys in spares)
        busiest = [max(loads) for loads in rows]
        mean = [sum(loads) / (8 + count) for loads in rows]
        after = imbalance(rows, spares).per_layer
        assert all(a * m <= b + 1e-9 for a, m, b in zip(after, mean, busiest, strict=True))
    alike = spread_layers([[10, 10]], 1, 4)
    assert imbalance([[10, 10]], alike).per_layer == (1.5,), "one spare cannot relieve both"


def test_both_forms_of_a_file_are_read() -> None:
    rows = [[3.0, 1.0], [2.0, 2.0], [4.0, 0.0]]
    answer = {
        "experts": [
            {"expert": 1, "rows_per_layer": [1, 2, 0], "replicas": 1},
            {"expert": 0, "rows_per_layer": [3, 2, 4]},
        ]
    }
    assert parse_load(json.dumps({"rows": rows}), "f") == rows
    assert parse_load(json.dumps(answer), "f") == rows


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "f: not JSON"),
        ("[]", 'f: expected an object with "experts"'),
        ('{"rows": []}', "f: rows: expected a list with one list per layer"),
        ('{"rows": [[1, 2], [1]]}', "f: rows: layer 1 has 1 experts, layer 0 has 2"),
        ('{"rows": [[1, -2]]}', "f: rows: layer 0, expert 1: expected a number from 0, got -2"),
        ('{"rows": [[1, NaN]]}', "f: rows: layer 0, expert 1"),
        ('{"rows": [[1, "a"]]}', "f: rows: layer 0, expert 1"),
        ('{"rows": [[0, 0]]}', "f: no rows were routed"),
        ('{"experts": {}}', "f: experts: expected a list"),
        ('{"experts": [{"expert": 1}]}', 'f: experts[0]: "expert" must be a number from 0 to 0, got 1'),
        ('{"experts": [{"expert": 0}]}', 'f: experts[0]: expert 0 has no "rows_per_layer"'),
        (
            '{"experts": [{"expert": 0, "rows_per_layer": [1]}, {"expert": 0, "rows_per_layer": [1]}]}',
            "f: experts[1]: expert 0 is there twice",
        ),
        (
            '{"experts": [{"expert": 0, "rows_per_layer": [1]}, {"expert": 1, "rows_per_layer": [1, 2]}]}',
            "f: rows_per_layer: expert 1 has 2 layers, expert 0 has 1",
        ),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(named)}"):
        parse_load(text, "f")


@pytest.mark.parametrize(("count", "each", "named"), [(-1, None, "--extra-replicas"), (1, 0, "--layers-per-spare")])
def test_options_that_mean_nothing_are_named(count: int, each: int | None, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        propose(HOT, count, each)


def test_experts_that_share_an_actor_add_up() -> None:
    assert imbalance([[30, 10, 5, 5]], (), 2).per_layer == (40 * 2 / 50,)
    assert imbalance([[30, 10, 5]], (), 2).per_layer == (40 * 2 / 45,)
    spare = frozenset({(0, 0)})
    assert imbalance([[30, 10, 5, 5]], (spare,), 2).per_layer == (25 * 3 / 50,)
    assert spread_layers([[30, 10, 5, 5]], 1, 4, 2) == ({(0, 0), (0, 1)},), "both relieve the hot group"
    made = propose([[30, 10, 5, 5]], 1, 1, 2)
    assert (made.before.total, made.after.total) == (pytest.approx(1.6), pytest.approx(1.5))
