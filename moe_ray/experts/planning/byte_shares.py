"""Shares of a card by bytes, for several trunks' deployments beside experts on alike cards. Pure data.

Ray lets actors meet on a card while their shares are at most 1. With a share of at least an actor's part of a card's
usable bytes no card is over its memory, whichever actors meet. Ray may place actors in any order, each on any card that
has room: an actor of share s finds none only where every card is filled to more than 1 - s. How many cards the others
can fill so far is a covering of bins (Assmann, Johnson, Kleitman, Leung 1984, "On a dual version of the one-dimensional
bin packing problem"), of which at most as many exist as there are actors of more than 1 - s, and times that the sum of
the smaller ones has 1 - s. Where that is less than the number of cards, there is always room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

from moe_ray.experts.planning.cards import GIB, PROCESS_BYTES, RESERVE, SHARE_UNITS, Card, Part, need_of

WORK_BYTES: Final = GIB // 2
"""Wanted in a budget beside weights and cache: what is computed with, and a layer as it is read, before it is held."""
_STEPS: Final = 40
"""Halvings of the range in which the largest shares are looked for."""


@dataclass(frozen=True, slots=True)
class ByteShare:
    """What each actor of one deployment gets of its card."""

    part: Part
    share: int
    """In ten-thousandths, as Ray counts."""
    budget_bytes: int
    """What it may take, its CUDA context not counted."""
    cache_bytes: int | None
    """Of a trunk: what of that its KV cache may take; None: it has none, or as its `Part` says."""


@dataclass(frozen=True, slots=True)
class PoolShares:
    """The shares of all deployments on alike or unlike cards."""

    smallest: Card
    """Of the cards that are used: by its memory all shares are counted."""
    kinds: tuple[str, ...]
    """Where only cards of these kinds are large enough; () where any card will do."""
    shares: tuple[ByteShare, ...]
    """In the order of the parts."""

    @property
    def busiest_bytes(self) -> int:
        """What the actors need that may meet on one card, the largest first."""
        total, room = 0, SHARE_UNITS
        for each in sorted(self.shares, key=lambda each: -each.share):
            fitting = min(each.part.replicas, room // each.share)
            total, room = total + fitting * need_of(each.part), room - fitting * each.share
        return total


def shares_of_pool(cards: Sequence[Card], parts: Sequence[Part], cache_is_fixed: bool = False) -> PoolShares | None:
    """Shares by bytes on all cards, or on the larger ones that their kinds tell apart.

    None: there are none, or Ray knows the memory of a card not.
    """
    if any(card.memory is None for card in cards):
        return None
    for least in sorted({card.memory or 0 for card in cards}):
        pool = [card for card in cards if (card.memory or 0) >= least]
        kinds = {card.kind for card in pool}
        if len(pool) < len(cards) and (None in kinds or any(card.kind in kinds for card in cards if card not in pool)):
            continue
        if (found := shares_by_bytes(pool, parts, cache_is_fixed)) is not None:
            told = () if len(pool) == len(cards) else tuple(sorted(kind for kind in kinds if kind is not None))
            return PoolShares(min(pool, key=lambda card: card.memory or 0), told, tuple(found))
    return None


def always_room(shares: Sequence[int], count: int) -> bool:
    """Whether actors of these shares find room on `count` cards, whatever the order and whichever cards are chosen.

    >>> always_room([5000] * 4, 2), always_room([6000, 6000, 3000], 2), always_room([6000, 6000, 3000], 3)
    (True, False, True)
    """
    for mine in set(shares):
        others = list(shares)
        others.remove(mine)
        filled = SHARE_UNITS - mine + 1
        large = sum(each >= filled for each in others)
        small = sum(each for each in others if each < filled)
        if mine > SHARE_UNITS or large + small // filled >= count:
            return False
    return True


def shares_by_bytes(cards: Sequence[Card], parts: Sequence[Part], cache_is_fixed: bool) -> list[ByteShare] | None:
    """Shares of `cards`, whose memory is known, in proportion to what each actor needs, as large as they may be.

    So a card that Ray fills first has no more to read than its part. What shares leave above the needs is the trunks'
    cache, unless `cache_is_fixed`. None: there may be no room for an actor.
    """
    usable = int(min(card.memory or 0 for card in cards) * (1 - RESERVE))
    for work in (WORK_BYTES, 0):
        needs = [need_of(part) + work for part in parts]
        largest = max(needs)
        if largest > usable:
            continue
        low, high = 1.0, usable / largest
        if not always_room(_shares(parts, needs, low, usable), len(cards)):
            continue
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if always_room(_shares(parts, needs, middle, usable), len(cards)):
                low = middle
            else:
                high = middle
        return _budgets(cards, parts, needs, low, cache_is_fixed)
    return None


def _shares(parts: Sequence[Part], needs: Sequence[int], factor: float, usable: int) -> list[int]:
    """Of every actor."""
    each = [ceil(SHARE_UNITS * factor * need / usable) for need in needs]
    return [share for share, part in zip(each, parts, strict=True) for _ in range(part.replicas)]


def _budgets(
    cards: Sequence[Card], parts: Sequence[Part], needs: Sequence[int], factor: float, cache_is_fixed: bool
) -> list[ByteShare]:
    """Half of the reserve is for what actors compute with, by their shares; half is the driver's."""
    memory = min(card.memory or 0 for card in cards)
    usable = int(memory * (1 - RESERVE))
    shares = [ceil(SHARE_UNITS * factor * need / usable) for need in needs]
    trunks = sorted(
        share for share, part in zip(shares, parts, strict=True) if part.cache_bytes for _ in range(part.replicas)
    )
    # Whichever actors meet, their needs are at most 1 / factor of a card; as many trunks as may meet share the rest.
    together = max((n for n in range(1, len(trunks) + 1) if sum(trunks[:n]) <= SHARE_UNITS), default=1)
    more = 0 if cache_is_fixed else int(usable * (1 - 1 / factor)) // together
    made = []
    for part, need, share in zip(parts, needs, shares, strict=True):
        cache = part.cache_bytes + more if part.cache_bytes else 0
        margin = int(memory * RESERVE / 2 * share / SHARE_UNITS)
        budget = need - part.cache_bytes + cache - PROCESS_BYTES + margin
        told = cache if cache and not cache_is_fixed else None
        made.append(ByteShare(part, share, budget, told))
    return made
