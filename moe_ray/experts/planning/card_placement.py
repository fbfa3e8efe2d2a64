"""Which cards trunk and experts take, where cards or parts are unlike, and a budget of memory for each. Pure data.

Ray is told a share of a card and, where not all cards will do, which nodes: so a placement is a number of groups of
cards that Ray can tell apart. On the cards of one group all actors have the same share, 1 / n of a card: whatever order
Ray places them in, and whichever n of them meet, all find room. A trunk may have cards of its own beside them: Ray puts
a share on the fullest card that has room for it (`ray/src/ray/common/scheduling`, best fit), so it leaves whole cards
free as long as experts fit on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from moe_ray.errors import ConfigError
from moe_ray.experts.planning.balance import GOOD_ENOUGH, MOST_EXTRA, Rows, imbalance, replicate
from moe_ray.experts.planning.byte_shares import WORK_BYTES, shares_of_pool
from moe_ray.experts.planning.cards import RESERVE, SHARE_UNITS, Card, Part, fullest, need_of, share_cards
from moe_ray.experts.planning.placement import experts_in


@dataclass(frozen=True, slots=True)
class PlacedPart:
    """What the actors of one deployment get."""

    part: Part
    card: Card
    """One of those that they may be on; they are all alike, unless no memory is known."""
    per_card: int
    """Actors of its kind on one card, at most."""
    nodes: tuple[str, ...] = ()
    """The nodes that they may be on; (): any with a card."""
    kinds: tuple[str, ...] = ()
    """Instead of nodes: the kinds of cards."""
    budget_bytes: int | None = None
    """What each actor may take of its card, its CUDA context not counted; None: it has the card to itself."""
    cache_bytes: int | None = None
    """Of a trunk: what of that its KV cache may take; None: what its weights leave, or what is configured."""
    share: int | None = None
    """Of a card, by its bytes, in Ray's units; None: as `per_card` says."""

    @property
    def num_gpus(self) -> float:
        """What each actor asks Ray for."""
        return (self.share or SHARE_UNITS // self.per_card) / SHARE_UNITS


@dataclass(frozen=True, slots=True)
class CardPlacement:
    """Where all actors are."""

    placed: tuple[PlacedPart, ...]
    """In the order of the parts."""
    load: float
    """Of the busiest card: bytes of the actors that may meet on it, over its bandwidth where that is known."""

    def of(self, name: str) -> PlacedPart | None:
        """What the deployment of this name gets; None: it computes on CPUs."""
        return next((each for each in self.placed if each.part.name == name), None)


@dataclass(frozen=True, slots=True)
class _Group:
    """Cards of one size that some actors share."""

    card: Card
    nodes: frozenset[str]
    count: int
    parts: tuple[Part, ...] = ()
    own: bool = False
    """They are a trunk's alone."""

    @property
    def per_card(self) -> int:
        return ceil(sum(part.replicas for part in self.parts) / self.count) if self.count else 0

    @property
    def room(self) -> int:
        """Bytes that remain on the fullest card, whichever actors meet there; below 0: they do not fit."""
        return int((self.card.memory or 0) * (1 - RESERVE)) - fullest(self.parts, self.per_card)

    def load(self, by_bandwidth: bool) -> float:
        return fullest(self.parts, self.per_card) / (self.card.read_gb_s or 1.0 if by_bandwidth else 1.0)

    def with_part(self, part: Part) -> _Group | None:
        """The same with one more deployment; None: it has no room."""
        if self.own or not self.count:
            return None
        more = replace(self, parts=(*self.parts, part))
        return more if more.room >= 0 else None


def place(cards: Sequence[Card], parts: Sequence[Part], cache_is_fixed: bool = False) -> CardPlacement:
    """Put `parts` on `cards`: a trunk on the largest, experts where the busiest card has least to read.

    A trunk has a card to itself where no other card has more actors for it; else what the others leave is its cache's.
    Where the cards do not differ and each actor has one, and where Ray knows no memory, all get equal shares: see
    `share_cards`. Where there are several trunks' deployments and not a card for each actor, each gets a share by its
    bytes: see `byte_shares`. `cache_is_fixed`: the cache is as large as its `Part` says. Raises `ConfigError` naming
    what is missing.
    """
    several = sum(part.cache_bytes > 0 for part in parts) > 1
    if several and (shared := _by_bytes(cards, parts, cache_is_fixed)) is not None:
        return shared
    found = _unlike(cards, parts, cache_is_fixed)
    actors = sum(part.replicas for part in parts)
    if found is not None and (len(set(map(_kind, cards))) > 1 or actors > len(cards)):
        return found
    shares = share_cards(cards, parts, cache_is_fixed)
    group = _Group(shares.cards[0], frozenset(), len(shares.cards), tuple(parts))
    known = all(card.memory is not None for card in shares.cards)
    if known:
        smallest = min(shares.cards, key=lambda card: card.memory or 0)
        group = replace(group, card=smallest)
    placed = tuple(_placed(group, part, shares.per_card, cache_is_fixed) for part in parts)
    if not known or shares.per_card == 1:
        placed = tuple(replace(each, budget_bytes=None) for each in placed)
    placed = tuple(replace(each, kinds=shares.kinds) for each in placed)
    by_bandwidth = all(card.read_gb_s is not None for card in cards)
    return CardPlacement(placed, group.load(by_bandwidth))


def with_hot_experts(
    cards: Sequence[Card], parts: Sequence[Part], rows: Rows, cache_is_fixed: bool = False
) -> tuple[CardPlacement, dict[int, int]]:
    """`place` with further replicas of the experts that had most of `rows`, where no card then has more to do.

    Returns expert -> further replicas as well. Only of experts with an actor of their own: of others there are none.
    Raises `ConfigError` as `place`.
    """
    best, added = place(cards, parts, cache_is_fixed), dict[int, int]()
    if {part.name for part in parts if experts_in(part.name)} != {f"Expert{number}" for number in range(len(rows[0]))}:
        return best, added
    least = best.load
    for count in range(1, MOST_EXTRA + 1):
        if imbalance(rows, replicate(rows, count - 1)).total <= GOOD_ENOUGH:
            break
        hot = [next(iter(keys))[1] for keys in replicate(rows, count)]
        more = {expert: hot.count(expert) for expert in hot}
        grown = [replace(part, replicas=part.replicas + _extra(part, more)) for part in parts]
        try:
            found = place(cards, grown, cache_is_fixed)
        except ConfigError:  # they do not fit any more
            break
        if found.load > least:
            break
        best, added = found, more
    return best, added


def _extra(part: Part, more: dict[int, int]) -> int:
    return sum(more.get(expert, 0) for expert in experts_in(part.name))


def _unlike(cards: Sequence[Card], parts: Sequence[Part], cache_is_fixed: bool) -> CardPlacement | None:
    """The best placement on groups of cards, the first among equals; None: there is none, or it cannot be told."""
    trunks = [part for part in parts if part.cache_bytes]
    others = [part for part in parts if not part.cache_bytes]
    per_node: dict[str, set[object]] = {}
    for card in cards:
        per_node.setdefault(card.node, set()).add(_kind(card))
    mixed = any(len(kinds) > 1 for kinds in per_node.values())
    if not others or len(trunks) > 1 or mixed or any(card.memory is None for card in cards):
        return None
    by_bandwidth = all(card.read_gb_s is not None for card in cards)
    classes = _classes(cards)
    for size in dict.fromkeys(group.card.memory for group in classes):
        found = []
        for groups in _arranged([group for group in classes if group.card.memory == size], classes, trunks, cards):
            if (filled := _filled(groups, others, by_bandwidth)) is not None:
                found.append((max(group.load(by_bandwidth) for group in filled), filled))
        if found:
            load, best = min(found, key=lambda each: each[0])
            return CardPlacement(tuple(_told(best, part, cards, cache_is_fixed) for part in parts), load)
        if not trunks:
            break
    return None


def _by_bytes(cards: Sequence[Card], parts: Sequence[Part], cache_is_fixed: bool) -> CardPlacement | None:
    """Shares by bytes; None: there are none to be had, or none are wanted, because each actor has a card."""
    if sum(part.replicas for part in parts) <= len(cards):
        return None
    if (found := shares_of_pool(cards, parts, cache_is_fixed)) is None:
        return None
    placed = tuple(
        PlacedPart(
            *(each.part, found.smallest, SHARE_UNITS // each.share, (), found.kinds),
            *(each.budget_bytes, each.cache_bytes, each.share),
        )
        for each in found.shares
    )
    by_bandwidth = all(card.read_gb_s is not None for card in cards)
    return CardPlacement(placed, found.busiest_bytes / (found.smallest.read_gb_s or 1.0 if by_bandwidth else 1.0))


def _kind(card: Card) -> tuple[str | None, int | None, float | None]:
    return card.kind, card.memory, card.read_gb_s


def _classes(cards: Sequence[Card]) -> list[_Group]:
    """The cards by size and kind, the largest first."""
    by_kind: dict[object, list[Card]] = {}
    for card in cards:
        by_kind.setdefault(_kind(card), []).append(card)
    groups = [_Group(own[0], frozenset(card.node for card in own), len(own)) for own in by_kind.values()]
    return sorted(groups, key=lambda group: (-(group.card.memory or 0), -(group.card.read_gb_s or 0.0)))


def _arranged(
    largest: Sequence[_Group], classes: Sequence[_Group], trunks: Sequence[Part], cards: Sequence[Card]
) -> Iterator[list[_Group]]:
    """The groups of cards with the trunk in one of `largest`: on cards of its own, then on shared ones."""
    if not trunks:
        yield list(classes)
        return
    (trunk,) = trunks
    for group in largest:
        rest = [other for other in classes if other is not group]
        yield from (
            [*own, *rest] for own in _alone(group, trunk, [card for card in cards if _kind(card) == _kind(group.card)])
        )
    for group in largest:
        shared = replace(group, parts=(trunk,))
        if shared.room >= 0:
            yield [shared, *(other for other in classes if other is not group)]


def _alone(group: _Group, trunk: Part, cards: Sequence[Card]) -> Iterator[list[_Group]]:
    """Cards of `group` taken apart: whole ones of the trunk, those that its node has beside, those of other nodes."""
    counts = {node: sum(card.node == node for card in cards) for node in sorted(group.nodes)}
    chosen: list[str] = []
    # The node with the most cards first: experts on it are near.
    for node in sorted(counts, key=lambda node: (-counts[node], node)):
        if sum(counts[each] for each in chosen) < trunk.replicas:
            chosen.append(node)
    held = sum(counts[node] for node in chosen)
    whole = replace(group, nodes=frozenset(chosen), count=trunk.replicas, parts=(trunk,), own=True)
    if held < trunk.replicas or whole.room < 0:
        return
    # Over several nodes Ray may leave half cards on each of them where the trunks want whole ones.
    beside = held - trunk.replicas if len(chosen) == 1 else 0
    near = replace(group, nodes=frozenset(chosen), count=beside)
    far = replace(group, nodes=group.nodes - set(chosen), count=group.count - held)
    yield [whole, *(each for each in (near, far) if each.count)]


def _filled(groups: Sequence[_Group], others: Sequence[Part], by_bandwidth: bool) -> list[_Group] | None:
    """`groups` with every part of `others` in one of them, the largest first; None: one finds no room."""
    filled = list(groups)
    for part in sorted(others, key=need_of, reverse=True):
        options = [
            (more.load(by_bandwidth), more.card.memory or 0, number, more)
            for number, group in enumerate(filled)
            if (more := group.with_part(part)) is not None
        ]
        if not options:
            return None
        *_, number, more = min(options, key=lambda option: option[:3])
        filled[number] = more
    return filled


def _told(groups: Sequence[_Group], part: Part, cards: Sequence[Card], cache_is_fixed: bool) -> PlacedPart:
    """What a part gets of the group that it is in, and by what Ray finds the group."""
    group = next(group for group in groups if part in group.parts)
    placed = _placed(group, part, group.per_card, cache_is_fixed)
    if group.nodes == {card.node for card in cards}:
        return placed
    kind = group.card.kind
    if kind is not None and group.nodes == {card.node for card in cards if card.kind == kind}:
        return replace(placed, kinds=(kind,))
    return replace(placed, nodes=tuple(sorted(group.nodes)))


def _placed(group: _Group, part: Part, per_card: int, cache_is_fixed: bool) -> PlacedPart:
    """A part's share and budget. Half of the reserve is for what actors compute with, half is the driver's.

    What remains makes that `WORK_BYTES` of each actor, as far as it goes. The rest is the trunk's cache, or of all
    alike where no trunk is on these cards.
    """
    memory = group.card.memory
    if memory is None or per_card == 1:
        return PlacedPart(part, group.card, per_card)
    left = max(0, int(memory * (1 - RESERVE)) - fullest(group.parts, per_card))
    margin = int(memory * RESERVE / 2) // per_card
    more = min(left // per_card, max(0, WORK_BYTES - margin))
    margin, left = margin + more, left - more * per_card
    trunk = next((each for each in group.parts if each.cache_bytes), None)
    if trunk is None:
        return PlacedPart(part, group.card, per_card, budget_bytes=part.weight_bytes + margin + left // per_card)
    if not part.cache_bytes:
        return PlacedPart(part, group.card, per_card, budget_bytes=part.weight_bytes + margin)
    cache = part.cache_bytes
    if not cache_is_fixed:
        trunks = sum(each.replicas for each in group.parts if each.cache_bytes)
        cache += left // min(trunks, per_card)
    budget = part.weight_bytes + cache + margin
    return PlacedPart(part, group.card, per_card, budget_bytes=budget, cache_bytes=None if cache_is_fixed else cache)
