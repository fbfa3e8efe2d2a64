"""The numbers by which replicas know the experts of several models: equal ones have one number, others their own."""

from __future__ import annotations

import pytest

from moe_ray.core import ReplicaInfo
from moe_ray.experts.planning.placement import holdings, with_variants
from moe_ray.experts.sharing import added_keys, origin, share

Layers = list[str]


def numbers(*models: Layers) -> list[list[list[int]]]:
    """Of models whose layers are words, an expert a letter: equal letters are equal experts."""
    contents = [{(i, e): letter for i, word in enumerate(model) for e, letter in enumerate(word)} for model in models]
    return [[list(row) for row in each.table] for each in share(contents)]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (["abcd", "efgh"], [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (["ABCD", "EFGH"], [[4, 5, 6, 7], [4, 5, 6, 7]]),
        (["abCd", "efgh"], [[0, 1, 6, 3], [0, 1, 2, 3]]),
        (["badc", "efgh"], [[1, 0, 3, 2], [0, 1, 2, 3]]),
        (["efgh", "abcd"], [[4, 5, 6, 7], [4, 5, 6, 7]]),
        (["XXcX", "aaaa"], [[4, 4, 2, 4], [4, 4, 4, 4]]),
    ],
    ids=["all", "none", "one layer of one differs", "permuted", "in other layers", "equals within"],
)
def test_an_equal_expert_has_one_number(variant: Layers, expected: list[list[int]]) -> None:
    base = ["abcd", "efgh"]
    assert numbers(base, variant) == [[[0, 1, 2, 3], [0, 1, 2, 3]], expected]


def test_variants_share_among_themselves_what_the_first_model_lacks() -> None:
    _, first, second = numbers(["abcd"], ["aXcd"], ["XbYd"])
    assert first == [[0, 5, 2, 3]]
    assert second == [[5, 1, 10, 3]]


def test_the_first_models_numbers_are_its_own_even_where_its_experts_are_equal() -> None:
    base, variant = numbers(["aabc"], ["bXaa"])
    assert base == [[0, 1, 2, 3]]
    assert variant == [[2, 5, 0, 0]]


def test_what_is_added_is_held_where_the_expert_of_its_number_is() -> None:
    models = share([dict(enumerate_keys(word)) for word in (["abcd", "efgh"], ["aXcd", "efgY"], ["ZXcd", "eWgY"])])
    added = added_keys(models[1:], 4)
    assert added == {(0, 5), (1, 7), (0, 8), (1, 9)}
    spare = frozenset({(0, 1), (0, 2)})
    placed = {one.name: one for one in with_variants(holdings(2, 4, 2, [spare]), added, 4)}
    assert placed["Experts0-1"].variant_keys == {(0, 5), (0, 8), (1, 9)}
    assert placed["Experts2-3"].variant_keys == {(1, 7)}
    assert placed["Spare0"].all_keys == spare | {(0, 5)}
    assert placed["Experts2-3"].experts == (2, 3)
    assert [origin(number, 4) for number in (3, 5, 9)] == [(0, 3), (1, 1), (2, 1)]


def test_a_trunk_sees_replicas_with_keys_of_its_own_numbers() -> None:
    _, variant = share([dict(enumerate_keys(word)) for word in (["abc"], ["bXa"])])
    info = ReplicaInfo("one", "node", 1, frozenset({(0, 0), (0, 4)}), 64, "float32", {})
    assert variant.told([info])[0].keys == {(0, 2), (0, 1)}
    assert [variant.of(0, expert) for expert in range(3)] == [1, 4, 0]


def enumerate_keys(layers: Layers) -> list[tuple[tuple[int, int], str]]:
    return [((i, e), letter) for i, word in enumerate(layers) for e, letter in enumerate(word)]
