"""How a model's actors share a cluster's cards, and what is asked for where they do not suffice."""

from __future__ import annotations

import itertools

import pytest

from moe_ray.errors import ConfigError
from moe_ray.experts.planning.cards import (
    GIB,
    MEMORY_GIB,
    Card,
    Part,
    Shares,
    describe,
    memory_of,
    share_cards,
)

MIXTRAL = [Part("Trunk", 3 * GIB, cache_bytes=GIB // 4), *(Part(f"Expert{e}", int(10.5 * GIB)) for e in range(8))]
"""Mixtral-8x7B at 16 bits."""
SMALL = [Part("Trunk", GIB // 8, cache_bytes=GIB // 100), *(Part(f"Expert{e}", GIB // 8) for e in range(8))]


def cards(count: int, kind: str | None = "T4", node: str = "n") -> list[Card]:
    return [Card(f"{node}{i}", kind, memory_of(kind)) for i in range(count)]


def test_a_card_each_where_there_are_enough() -> None:
    shares = share_cards(cards(9), MIXTRAL)
    assert (shares.num_gpus, shares.per_card, shares.kinds) == (1, 1, ())
    assert share_cards(cards(12), MIXTRAL).num_gpus == 1


def test_large_cards_are_shared() -> None:
    shares = share_cards(cards(3, "A100-80G"), MIXTRAL)
    assert (shares.num_gpus, shares.per_card) == (0.3333, 3)
    assert describe(shares.cards) == "3 cards (3 x A100-80G, 80 GiB)"


@pytest.mark.parametrize(("count", "replicas"), itertools.product(range(1, 10), (1, 2, 3)))
def test_whatever_the_order_every_actor_finds_room(count: int, replicas: int) -> None:
    parts = [SMALL[0], *(Part(part.name, part.weight_bytes, replicas) for part in SMALL[1:])]
    shares = share_cards(cards(count, "H100"), parts)
    slots = int(10_000 / round(shares.num_gpus * 10_000))
    assert slots >= shares.per_card
    assert count * shares.per_card >= 1 + 8 * replicas


def test_only_cards_that_are_large_enough_are_used() -> None:
    mixed = [*cards(9, "A100-40G", "a"), *cards(4, "P4", "p")]
    shares = share_cards(mixed, MIXTRAL)
    assert (shares.kinds, shares.num_gpus, len(shares.cards)) == (("A100-40G",), 1, 9)
    two = [*cards(5, "L4", "a"), *cards(4, "T4", "b"), *cards(1, "P4", "p")]
    assert share_cards(two, MIXTRAL).kinds == ("L4", "T4")


def test_what_is_missing_is_said() -> None:
    with pytest.raises(
        ConfigError, match=r"9 actors need .* 4 cards \(4 x T4, 16 GiB\): needed are 9 cards with 16 GiB"
    ):
        share_cards(cards(4), MIXTRAL)
    with pytest.raises(ConfigError, match=r"largest \(Expert0\) 11\.0 GiB.*cards with at least 13 GiB.*--device cpu"):
        share_cards(cards(20, "P4"), MIXTRAL)


def test_cards_of_unknown_memory() -> None:
    unknown = cards(9, None)
    assert share_cards(unknown, MIXTRAL) == Shares(tuple(unknown), 1)
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_gib.*moe-ray/gpu-memory-gib=<GiB>"):
        share_cards(unknown[:4], MIXTRAL)
    assert share_cards(unknown[:4], MIXTRAL, cache_is_fixed=True).per_card == 3
    alone = [Part("Trunk", 93 * GIB, cache_bytes=GIB)]  # transport: local
    assert share_cards(unknown[:2], alone).num_gpus == 1


def test_memory_is_what_the_label_says_else_the_table() -> None:
    assert memory_of("T4") == 16 * GIB
    assert memory_of("T4", "15") == 15 * GIB
    assert memory_of("Some-Card") is memory_of(None) is memory_of("T4", "much") is None
    assert memory_of("Some-Card", "12") == 12 * GIB


def test_the_table_uses_names_of_ray() -> None:
    from ray.util.accelerators import accelerators

    names = {value for name, value in vars(accelerators).items() if name.startswith("NVIDIA")}
    assert set(MEMORY_GIB) - names <= {"A10"}, "Ray calls these cards otherwise"
    assert names - set(MEMORY_GIB) == set(), "Ray knows cards whose memory we do not"
