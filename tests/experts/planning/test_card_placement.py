"""Placements on cards, unlike ones too: none over its memory in whatever order Ray places, every part placed once."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.errors import ConfigError
from moe_ray.experts.planning.balance import imbalance
from moe_ray.experts.planning.byte_shares import always_room
from moe_ray.experts.planning.card_placement import CardPlacement, PlacedPart, place, with_hot_experts
from moe_ray.experts.planning.cards import GIB, PROCESS_BYTES, RESERVE, Card, Part, memory_of, share_cards


def mixtral(expert_gib: float, trunk_gib: float = 3.0, replicas: int = 1) -> list[Part]:
    experts = [Part(f"Expert{e}", int(expert_gib * GIB), replicas) for e in range(8)]
    return [Part("Trunk", int(trunk_gib * GIB), cache_bytes=GIB // 4), *experts]


FLOAT, INT8, INT4 = mixtral(10.5), mixtral(5.33), mixtral(2.95)


def node(name: str, count: int, kind: str, speed: float | None = None) -> list[Card]:
    return [Card(name, kind, memory_of(kind), speed)] * count


def shares(placement: CardPlacement) -> dict[str, float]:
    return {each.part.name: each.num_gpus for each in placement.placed}


def test_the_trunk_is_on_the_large_card_and_experts_on_the_others() -> None:
    cards = [*node("a", 1, "A100-80G"), *node("b", 4, "L4"), *node("c", 4, "L4")]
    found = place(cards, FLOAT)
    trunk, *experts = found.placed
    assert (trunk.kinds, trunk.num_gpus, trunk.budget_bytes) == (("A100-80G",), 1, None)
    assert {(each.kinds, each.num_gpus) for each in experts} == {(("L4",), 1)}


def test_small_experts_share_cards_and_have_budgets() -> None:
    cards = [*node("a", 1, "L4"), *node("b", 4, "T4")]
    found = place(cards, INT4)
    trunk, expert, *_ = found.placed
    assert (trunk.kinds, trunk.num_gpus) == (("L4",), 1)
    assert (expert.kinds, expert.num_gpus, expert.per_card) == (("T4",), 0.5, 2)
    assert expert.budget_bytes is not None
    assert expert.part.weight_bytes < expert.budget_bytes <= 8 * GIB - PROCESS_BYTES


def test_one_node_needs_no_labels() -> None:
    found = place(node("a", 5, "L4"), INT8)
    assert {(each.nodes, each.kinds) for each in found.placed} == {((), ())}
    assert shares(found) == {"Trunk": 1, **{f"Expert{e}": 0.5 for e in range(8)}}


def test_a_trunk_shares_its_card_where_that_spreads_the_experts() -> None:
    found = place(node("a", 2, "A100-80G"), INT8)
    trunk = found.of("Trunk")
    assert trunk is not None
    assert set(shares(found).values()) == {0.2}, "five and four, rather than eight on one card and one on the other"
    assert trunk.cache_bytes is not None
    assert trunk.cache_bytes > 30 * GIB
    assert found.of("Gateway") is None


def test_one_card_for_all() -> None:
    found = place(node("a", 1, "A100-80G"), INT4)
    assert set(shares(found).values()) == {0.1111}
    held = sum((each.budget_bytes or 0) + PROCESS_BYTES for each in found.placed)
    assert held <= 80 * GIB


def test_a_large_card_helps_out_where_the_small_ones_do_not_suffice() -> None:
    found = place([*node("a", 1, "A100-80G"), *node("b", 4, "L4")], FLOAT)
    assert Counter(each.kinds for each in found.placed) == {("A100-80G",): 5, ("L4",): 4}
    assert found.placed[0].kinds == ("A100-80G",)


def test_faster_cards_get_more() -> None:
    slow, fast = [Card("a", "slow", 80 * GIB, 500.0)], [Card("b", "fast", 80 * GIB, 2000.0)]
    found = place([*slow, *fast], [part for part in INT4 if not part.cache_bytes])
    assert Counter(each.kinds for each in found.placed) == {("fast",): 7, ("slow",): 1}


def test_a_small_card_takes_the_trunk_where_experts_need_the_large_ones() -> None:
    cards = [*node("a", 8, "T4"), Card("b", "small", 8 * GIB)]
    trunk, *experts = place(cards, FLOAT).placed
    assert trunk.kinds == ("small",)
    assert {each.num_gpus for each in experts} == {1}


def test_nodes_are_named_where_kinds_do_not_tell_them_apart() -> None:
    cards = [*node("a", 1, "L4"), *node("b", 1, "L4"), *node("c", 1, "L4"), *node("d", 1, "L4"), *node("e", 1, "L4")]
    trunk, *experts = place(cards, INT8).placed
    assert (trunk.nodes, trunk.num_gpus) == (("a",), 1)
    assert {(each.nodes, each.num_gpus) for each in experts} == {(("b", "c", "d", "e"), 0.5)}


def test_equal_shares_where_no_memory_is_known_or_each_has_a_card() -> None:
    unknown = [Card("a", None, None)] * 9
    found = place(unknown, FLOAT)
    assert {(each.num_gpus, each.budget_bytes, each.nodes) for each in found.placed} == {(1, None, ())}
    found = place([card for i in range(9) for card in node(str(i), 1, "T4")], FLOAT)
    assert {(each.num_gpus, each.budget_bytes, each.nodes, each.kinds) for each in found.placed} == {(1, None, (), ())}


def test_hot_experts_get_the_cards_that_remain() -> None:
    rows = [[70.0, 10, 10, 10, 30, 10, 10, 10]] * 4
    cards = [card for i in range(11) for card in node(str(i), 1, "T4")]
    found, added = with_hot_experts(cards, FLOAT, rows)
    assert added == {0: 2}
    assert [each.part.replicas for each in found.placed] == [1, 3, 1, 1, 1, 1, 1, 1, 1]
    assert with_hot_experts(cards[:9], FLOAT, rows)[1] == {}, "none remains"
    even = [[10.0] * 8]
    assert with_hot_experts(cards, FLOAT, even)[1] == {}, "none is hot"
    assert imbalance(even).total == 1
    groups = [FLOAT[0], *(Part(f"Experts{e}-{e + 1}", 10 * GIB) for e in range(0, 8, 2))]
    assert with_hot_experts(cards, groups, rows)[1] == {}


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ConfigError, match=r"9 actors need .* the cluster has 2 cards"):
        place([*node("a", 1, "T4"), *node("b", 1, "L4")], FLOAT)


KINDS = ("P4", "T4", "L4", "A100-40G", "A100-80G")


@st.composite
def fleets(draw: st.DrawFn) -> list[Card]:
    nodes = draw(st.lists(st.tuples(st.integers(1, 4), st.sampled_from(KINDS)), min_size=1, max_size=5))
    return [card for number, (count, kind) in enumerate(nodes) for card in node(f"n{number}", count, kind)]


@st.composite
def models(draw: st.DrawFn) -> list[Part]:
    trunk = Part("Trunk", draw(st.integers(1, 8)) * GIB // 2, draw(st.integers(1, 2)), GIB // 4)
    sizes = draw(st.lists(st.integers(1, 22), min_size=1, max_size=9))
    experts = [Part(f"Expert{e}", size * GIB // 2, draw(st.integers(1, 2))) for e, size in enumerate(sizes)]
    return [trunk, *experts]


class Fleet:
    """Cards on which actors are placed one by one, as Ray does: on any node, there on the fullest card with room."""

    def __init__(self, cards: list[Card], seed: int) -> None:
        self.random = random.Random(seed)
        self.cards = cards
        self.free = [10_000] * len(cards)
        self.on: list[list[PlacedPart]] = [[] for _ in cards]

    def put(self, placed: PlacedPart) -> None:
        share = round(placed.num_gpus * 10_000)
        able = [
            i
            for i, card in enumerate(self.cards)
            if (not placed.nodes or card.node in placed.nodes)
            and (not placed.kinds or card.kind in placed.kinds)
            and self.free[i] >= share
        ]
        assert able, f"{placed.part.name} finds no room"
        chosen = self.random.choice(sorted({self.cards[i].node for i in able}))
        card = min((i for i in able if self.cards[i].node == chosen), key=lambda i: self.free[i])
        self.free[card] -= share
        self.on[card].append(placed)

    def check(self) -> None:
        for card, actors in zip(self.cards, self.on, strict=True):
            assert card.memory is not None
            needs = sum(each.part.weight_bytes + each.part.cache_bytes + PROCESS_BYTES for each in actors)
            assert needs <= card.memory * (1 - RESERVE)
            if all(each.budget_bytes is not None for each in actors):
                assert sum((each.budget_bytes or 0) + PROCESS_BYTES for each in actors) <= card.memory


@given(fleets(), models(), st.integers(0, 2**16))
def test_no_card_is_over_its_memory_whatever_the_order(cards: list[Card], parts: list[Part], seed: int) -> None:
    try:
        found = place(cards, parts)
    except ConfigError:
        return
    assert [each.part for each in found.placed] == parts, "every part once, in order"
    for each in found.placed:
        assert each.budget_bytes is None or each.budget_bytes >= each.part.weight_bytes + (each.cache_bytes or 0)
    fleet = Fleet(cards, seed)
    actors = [each for each in found.placed for _ in range(each.part.replicas)]
    fleet.random.shuffle(actors)
    for each in actors:
        fleet.put(each)
    fleet.check()


@st.composite
def several_models(draw: st.DrawFn) -> list[Part]:
    """Trunks of two to four models, and the experts that they share."""
    first, *experts = draw(models())
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    more = [Part(f"Trunk-{n}", size * GIB // 2, draw(st.integers(1, 2)), GIB // 4) for n, size in enumerate(sizes)]
    return [first, *more, *experts]


@given(fleets(), several_models(), st.booleans(), st.integers(0, 2**16))
def test_trunks_of_several_models_find_room_whatever_the_order(
    cards: list[Card], parts: list[Part], fixed: bool, seed: int
) -> None:
    try:
        found = place(cards, parts, fixed)
    except ConfigError:
        return
    fleet = Fleet(cards, seed)
    actors = [each for each in found.placed for _ in range(each.part.replicas)]
    fleet.random.shuffle(actors)
    for each in actors:
        fleet.put(each)
    fleet.check()
    for card, on in zip(cards, fleet.on, strict=True):
        caches = sum((each.cache_bytes or each.part.cache_bytes) - each.part.cache_bytes for each in on)
        needs = sum(each.part.weight_bytes + each.part.cache_bytes + PROCESS_BYTES for each in on)
        assert needs + caches <= (card.memory or 0) * (1 - RESERVE) + len(on), "with what caches take beyond the least"


def test_each_trunk_has_a_share_by_its_bytes() -> None:
    """Of three models on four cards: by equal shares two experts may meet, which no card holds."""
    experts = [Part(f"Expert{e}", 11 * GIB) for e in range(4)]
    trunks = [Part("Trunk", 3 * GIB, cache_bytes=GIB // 4), Part("Trunk-a", GIB, cache_bytes=GIB // 4)]
    parts = [*trunks, Part("Trunk-b", 2 * GIB, cache_bytes=GIB // 4), *experts]
    cards = [card for i in range(4) for card in node(str(i), 1, "L4")]
    found = place(cards, parts)
    by_name = shares(found)
    assert by_name["Trunk-a"] < by_name["Trunk-b"] < by_name["Trunk"] < by_name["Expert0"]
    for each in found.placed:
        need = each.part.weight_bytes + each.part.cache_bytes + PROCESS_BYTES
        assert each.num_gpus >= need / (24 * GIB * (1 - RESERVE))
        assert each.budget_bytes is not None
        assert (each.cache_bytes or 0) >= each.part.cache_bytes
    with pytest.raises(ConfigError):
        share_cards(cards, parts)
    assert {each.num_gpus for each in place([*cards, *node("x", 3, "L4")], parts).placed} == {1}, "a card for each"
    (fixed,) = {each.cache_bytes for each in place(cards, parts, cache_is_fixed=True).placed}
    assert fixed is None


def test_larger_cards_alone_are_told_by_their_kind() -> None:
    experts = [Part(f"Expert{e}", 5 * GIB) for e in range(8)]
    parts = [*(Part(name, 20 * GIB, cache_bytes=GIB) for name in ("Trunk", "Trunk-a")), *experts]
    found = place([*node("a", 2, "A100-80G"), *node("b", 1, "T4")], parts)
    assert {each.kinds for each in found.placed} == {("A100-80G",)}
    unknown = [Card("a", None, None)] * 3
    with pytest.raises(ConfigError, match="whose memory Ray does not know"):
        place(unknown, parts)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 2**16))
def test_shares_that_always_find_room(shares: list[int], count: int, seed: int) -> None:
    """Against an adversary that fills the cards as badly as chance finds."""
    if not always_room(shares, count):
        return
    draw = random.Random(seed)
    for _ in range(20):
        draw.shuffle(shares)
        free = [10_000] * count
        for share in shares:
            able = [card for card in range(count) if free[card] >= share]
            assert able
            free[draw.choice(able)] -= share


@given(fleets(), models())
def test_the_trunk_is_on_a_largest_card_unless_experts_then_find_no_room(cards: list[Card], parts: list[Part]) -> None:
    try:
        trunk = place(cards, parts).placed[0]
    except ConfigError:
        return
    assert trunk.card.memory is not None
    larger = [card for card in cards if (card.memory or 0) > trunk.card.memory]
    if larger and not (trunk.kinds == () and trunk.nodes == ()):
        with pytest.raises(ConfigError):
            place(larger, parts)
