"""How trunk and experts share a cluster's cards: pure data, from what Ray reports of the cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

from moe_ray.errors import ConfigError

GIB: Final = 2**30
RESERVE: Final = 0.1
"""The share of a card kept for activations and the runtime, as in `footprint.Plan.fits`."""
PROCESS_BYTES: Final = GIB // 2
"""What each process takes of a card beside its weights: its CUDA context and libraries."""
SHARE_UNITS: Final = 10_000
"""Ray counts shares of a card in ten-thousandths."""

MEMORY_GIB: Final = {
    "K80": 12,
    "P4": 8,
    "P100": 16,
    "V100": 16,
    "T4": 16,
    "A10G": 24,
    "A10": 24,
    "L4": 24,
    "L40S": 48,
    "A100": 40,
    "A100-40G": 40,
    "A100-80G": 80,
    "H100": 80,
    "H20": 96,
    "H200": 141,
    "B200": 180,
    "GB200": 186,
    "B300": 270,
    "GB300": 270,
    "RTX-PRO-6000": 96,
}
"""By Ray's name of the card; where cards of one name come in several sizes, the smallest."""

COMMON: Final = (
    (4, "GTX 1650"),
    (6, "RTX 2060"),
    (8, "RTX 4060"),
    (12, "RTX 3060"),
    (16, "T4, V100, RTX 4060 Ti"),
    (24, "L4, A10G, RTX 4090"),
    (32, "RTX 5090"),
    (40, "A100-40G"),
    (48, "L40S, RTX A6000"),
    (80, "A100-80G, H100"),
    (96, "H20, RTX-PRO-6000"),
    (141, "H200"),
    (180, "B200"),
    (270, "B300"),
)
"""Sizes of cards in GiB, ascending, and common cards of each."""


def smallest_card(need_bytes: int) -> tuple[int, str] | None:
    """The smallest of `COMMON` that holds one process with so many bytes of weights and cache; None: none does."""
    for gib, names in COMMON:
        if need_bytes + PROCESS_BYTES <= int(gib * GIB * (1 - RESERVE)):
            return gib, names
    return None


@dataclass(frozen=True, slots=True)
class Card:
    """One card of the cluster."""

    node: str
    kind: str | None = None
    """Ray's name of it, where Ray knows one."""
    memory: int | None = None
    """In bytes; None: not known."""
    read_gb_s: float | None = None
    """What it reads of its memory, as its node's label or its data sheet says; None: not known."""


@dataclass(frozen=True, slots=True)
class Part:
    """The actors of one deployment: each holds the same weights."""

    name: str
    weight_bytes: int
    replicas: int = 1
    cache_bytes: int = 0
    """The least KV cache that it needs beside the weights: a trunk's."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Every actor takes the same share of a card: whatever order Ray places them in, all find room."""

    cards: tuple[Card, ...]
    """Those that are used."""
    per_card: int
    """Actors on one card, at most."""
    kinds: tuple[str, ...] = ()
    """Where only cards of these kinds are large enough; () where any card will do."""

    @property
    def num_gpus(self) -> float:
        """What each actor asks Ray for."""
        return (SHARE_UNITS // self.per_card) / SHARE_UNITS


def memory_of(kind: str | None, label_gib: str | None = None) -> int | None:
    """A card's memory in bytes: from its node's label, else from the table; None where neither tells."""
    try:
        gib = float(label_gib) if label_gib else MEMORY_GIB.get(kind or "")
    except ValueError:
        gib = None
    return None if gib is None or gib <= 0 else int(gib * GIB)


def share_cards(cards: Sequence[Card], parts: Sequence[Part], cache_is_fixed: bool = False) -> Shares:
    """Spread the actors of `parts` evenly over `cards` (at least one); over the larger ones where not all will do.

    Where a trunk shares a card, the memory of the cards must be known, for its cache must leave the others room; not
    so where `cache_is_fixed`: the cache is as large as its `Part` says.
    Raises `ConfigError` naming what is missing.
    """
    known = sorted({card.memory for card in cards if card.memory is not None})
    pools = [list(cards)]
    pools += [[card for card in cards if card.memory is not None and card.memory >= least] for least in known]
    for pool in pools:
        if pool and (shares := _share(pool, parts, len(pool) == len(cards), cache_is_fixed)) is not None:
            return shares
    raise ConfigError(missing(cards, parts))


def missing(cards: Sequence[Card], parts: Sequence[Part]) -> str:
    """What the cluster would need, in one sentence."""
    actors = sum(part.replicas for part in parts)
    total = sum((part.weight_bytes + PROCESS_BYTES) * part.replicas for part in parts)
    largest = max(parts, key=need_of)
    said = (
        f"{actors} actors need {total / GIB:.1f} GiB, the largest ({largest.name}) {need_of(largest) / GIB:.1f} GiB, "
        f"and the cluster has {describe(cards)}"
    )
    sizes = [card.memory for card in cards if card.memory is not None]
    if not sizes:
        return (
            f"{said}, whose memory Ray does not know: the trunk would share one. Set engine.kv_cache_gib, or start the "
            f"nodes with the label {MEMORY_LABEL}=<GiB>, or set num_gpus by hand, or compute on CPUs with --device cpu"
        )
    fitting = _most_per_card(max(sizes), parts)
    if fitting:
        wanted = f"{ceil(actors / fitting)} cards with {max(sizes) / GIB:.0f} GiB"
    else:
        wanted = f"cards with at least {ceil(need_of(largest) / (1 - RESERVE) / GIB)} GiB"
    return f"{said}: needed are {wanted}; or set num_gpus by hand, or compute on CPUs with --device cpu"


MEMORY_LABEL: Final = "moe-ray/gpu-memory-gib"
"""Label of a Ray node: the memory of each of its cards in GiB, where Ray does not know their kind."""


def describe(cards: Sequence[Card]) -> str:
    """The cards as a person counts them: 8 cards (8 x T4, 16 GiB)."""
    counts = Counter((card.kind or "of unknown kind", card.memory) for card in cards)
    kinds = [
        f"{count} x {kind}" + ("" if memory is None else f", {memory / GIB:.0f} GiB")
        for (kind, memory), count in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] or 0))
    ]
    return f"{len(cards)} card{'s' if len(cards) != 1 else ''} ({'; '.join(kinds)})"


def _share(pool: Sequence[Card], parts: Sequence[Part], whole: bool, cache_is_fixed: bool) -> Shares | None:
    """Equal shares of the cards of `pool`, or None where they do not fit, or cannot be told apart from the others."""
    kinds = tuple(sorted({card.kind for card in pool if card.kind is not None}))
    if not whole and (not kinds or any(card.kind is None for card in pool)):
        return None
    per_card = ceil(sum(part.replicas for part in parts) / len(pool))
    sizes = [card.memory for card in pool]
    least = None if None in sizes else min(size for size in sizes if size is not None)
    shared = per_card > 1 and not cache_is_fixed and any(part.cache_bytes for part in parts)
    if least is None:
        return None if shared else Shares(tuple(pool), per_card, () if whole else kinds)
    if fullest(parts, per_card) > int(least * (1 - RESERVE)):
        return None
    return Shares(tuple(pool), per_card, () if whole else kinds)


def fullest(parts: Sequence[Part], per_card: int) -> int:
    """Bytes on the fullest card when any `per_card` actors may meet on one."""
    needs = sorted((need for part in parts for need in [need_of(part)] * part.replicas), reverse=True)
    return sum(needs[:per_card])


def _most_per_card(memory: int, parts: Sequence[Part]) -> int:
    """How many actors a card of `memory` bytes holds, whichever they are; 0: not even the largest."""
    actors = sum(part.replicas for part in parts)
    usable = int(memory * (1 - RESERVE))
    return max((count for count in range(1, actors + 1) if fullest(parts, count) <= usable), default=0)


def need_of(part: Part) -> int:
    """Bytes that one actor of a part takes of a card at least: weights, cache and its process."""
    return part.weight_bytes + part.cache_bytes + PROCESS_BYTES
