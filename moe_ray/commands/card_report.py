"""What the start of `moe-ray serve` says of the placement on cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from moe_ray.commands.planned import size
from moe_ray.experts.planning.card_placement import CardPlacement, PlacedPart
from moe_ray.experts.planning.cards import GIB, Card, describe, smallest_card


def print_placement(console: Console, placement: CardPlacement, cards: Sequence[Card], notes: Sequence[str]) -> None:
    """Print which actors are on which cards, alike ones in one row, then `notes`, a line each."""
    console.print(describe(cards), markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("actors", "card", "share", "weights", "budget"):
        table.add_column(column, justify="left" if column in ("actors", "card") else "right")
    for _, alike in groupby(placement.placed, key=_row):
        found = list(alike)
        name = found[0].part.name if len(found) == 1 else f"{found[0].part.name} to {found[-1].part.name}"
        count = sum(each.part.replicas for each in found)
        table.add_row(name if count == len(found) else f"{name} ({count})", *_row(found[0]))
    console.print(table)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def placement_notes(
    placement: CardPlacement, lacking_bfloat16: Sequence[str], dtype: str, added: Mapping[int, int]
) -> list[str]:
    """What has to be known of a placement, a sentence each. `added`: expert -> replicas added for its recorded load."""
    notes = []
    if lacking_bfloat16 and dtype == "float16":
        notes.append(f"{', '.join(lacking_bfloat16)} has no bfloat16: all actors compute in float16")
    elif lacking_bfloat16 and dtype == "bfloat16":
        notes.append(f"{', '.join(lacking_bfloat16)} has no bfloat16, and computes it slowly; use --dtype float16")
    shared = max((placed.per_card for placed in placement.placed), default=0)
    if shared > 1:
        notes.append(
            f"up to {shared} actors share a card: they take turns on it, unless CUDA MPS runs on its node; "
            f"a budget holds what torch takes, each process has about half a GiB beside it"
        )
    for placed in placement.placed:
        if placed.cache_bytes is not None:
            notes.append(f"{placed.part.name}: its KV cache may take {placed.cache_bytes / GIB:.1f} GiB")
        if placed.part.cache_bytes and placed.nodes:
            notes.append(f"{placed.part.name} is held to node {', '.join(placed.nodes)}: should it be lost, serve anew")
    if added:
        said = ", ".join(f"expert {expert} ({count})" for expert, count in sorted(added.items()))
        notes.append(f"further replicas for the recorded load, on cards that remained: {said}")
    return notes


def would_fit(formats: Sequence[str], offload_gib: float | None, largest: int, largest_name: str) -> str:
    """What would do where cards do not: formats of the experts, an offload, the smallest cards for the largest actor.

    >>> would_fit(("int8",), None, 20 * 2**30, "Expert0")
    'experts in int8 would fit (--quantize); the smallest cards that hold Expert0 as it is: 24 GiB (L4, A10G, RTX 4090)'
    """
    card = smallest_card(largest)
    fitting = f"experts in {' or '.join(formats)} would fit (--quantize)"
    said = fitting if formats else "no format that moe_ray quantises to would fit"
    if offload_gib is not None:
        said += f"; so would {offload_gib:g} GiB of each expert in the host's memory, slower (--cpu-offload-gib)"
    alone = "there is no card" if card is None else f"{card[0]} GiB ({card[1]})"
    return f"{said}; the smallest cards that hold {largest_name} as it is: {alone}"


def _row(placed: PlacedPart) -> tuple[str, str, str, str]:
    card = placed.card
    memory = "" if card.memory is None else f"{card.memory / GIB:.0f} GiB"
    name = " ".join(filter(None, (card.kind, memory))) or "of unknown kind"
    budget = "the whole card" if placed.budget_bytes is None and placed.per_card == 1 else "not limited"
    if placed.budget_bytes is not None:
        budget = size(placed.budget_bytes)
    return name, f"{placed.num_gpus:g}", size(placed.part.weight_bytes), budget
