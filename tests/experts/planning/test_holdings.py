"""Who holds what: every key once in the full deployments, spares beside them, and names that tell which experts."""

from __future__ import annotations

import itertools

import pytest

from moe_ray.config.number_sets import format_runs, parse_runs
from moe_ray.experts.planning.placement import experts_in, group_name, holdings, holds_experts, rank


@pytest.mark.parametrize("per_actor", [1, 2, 3, 5, 8, 9])
def test_groups_hold_every_key_once(per_actor: int) -> None:
    placed = holdings(3, 8, per_actor)
    keys = [key for held in placed for key in held.keys]
    assert sorted(keys) == sorted(itertools.product(range(3), range(8)))
    assert [expert for held in placed for expert in held.experts] == list(range(8))
    assert all(len(held.experts) == per_actor for held in placed[:-1])
    for held in placed:
        assert tuple(experts_in(held.name)) == held.experts
        assert held.spare is None


def test_names() -> None:
    assert [held.name for held in holdings(1, 4)] == ["Expert0", "Expert1", "Expert2", "Expert3"]
    assert [held.name for held in holdings(1, 8, 3)] == ["Experts0-2", "Experts3-5", "Experts6-7"]
    assert [held.name for held in holdings(1, 5, 2)] == ["Experts0-1", "Experts2-3", "Expert4"]
    assert group_name((3,)) == "Expert3"
    for other in ("Gateway", "Trunk", "Spare0", "Expert", "Experts1-", "Expertise3", "Expert3x"):
        assert list(experts_in(other)) == []


def test_spares_come_on_top() -> None:
    keys = {(1, 3), (2, 3), (0, 1)}
    *full, first, second = holdings(3, 4, 2, [keys, {(0, 0)}])
    assert full == list(holdings(3, 4, 2))
    assert (first.name, first.keys, first.experts, first.spare) == ("Spare0", frozenset(keys), (1, 3), 0)
    assert (second.name, second.spare) == ("Spare1", 1)


def test_the_order_of_deployments() -> None:
    names = ["Spare10", "Experts10-11", "Spare2", "Trunk", "Experts2-3", "Expert12", "Gateway"]
    assert sorted(names, key=lambda name: (rank(name), name)) == [
        *("Gateway", "Trunk", "Experts2-3", "Experts10-11", "Expert12", "Spare2", "Spare10")
    ]
    assert [name for name in names if not holds_experts(name)] == ["Trunk", "Gateway"]


@pytest.mark.parametrize(
    ("text", "numbers"), [("7", [7]), ("0,2,4-6", [0, 2, 4, 5, 6]), (" 3 , 1-1", [3, 1]), ("4-5,5", [4, 5, 5])]
)
def test_runs_are_read(text: str, numbers: list[int]) -> None:
    runs = parse_runs(text)
    assert runs is not None
    assert [number for run in runs for number in run] == numbers
    assert parse_runs(format_runs(numbers)) == parse_runs(format_runs(sorted(numbers)))


def test_runs_are_written_as_they_are_read() -> None:
    assert parse_runs("all") is None
    assert format_runs([6, 4, 5, 0, 2, 2]) == "0,2,4-6"
    assert format_runs([]) == ""
    for chosen in itertools.product((False, True), repeat=6):
        numbers = [number for number, take in enumerate(chosen) if take]
        if numbers:
            assert [number for run in parse_runs(format_runs(numbers)) or () for number in run] == numbers


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "-1", "1-", "1--2", "1 2", "1:2", "0x1", "all,1"])
def test_what_is_no_run(text: str) -> None:
    with pytest.raises(ValueError, match="must be `all` or numbers and runs of them, such as 0,2,4-6"):
        parse_runs(text)


def test_a_run_backwards() -> None:
    with pytest.raises(ValueError, match="6-4: the first number must not be above the last"):
        parse_runs("1,6-4")
