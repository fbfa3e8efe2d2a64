"""Puts the actors of a server on the cards of the cluster that it is deployed to, and says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from moe_ray.commands.card_report import placement_notes, print_placement, would_fit
from moe_ray.commands.planned import Planned, planned
from moe_ray.config import Config
from moe_ray.deploy.cards import by_hand, cluster_cards, lacking_bfloat16, on_cards, parts_of
from moe_ray.deploy.recorded_load import recorded_rows
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.card_placement import place, with_hot_experts
from moe_ray.experts.planning.cards import GIB, Card, need_of
from moe_ray.experts.planning.offload import OFFLOADS
from moe_ray.experts.planning.placement import experts_in

FORMATS: Final = ("int8", "int4")
"""What is tried for the experts where the cards do not hold them as they are, in this order."""


def on_cluster_cards(config: Config, directory: Path, plan: Planned, console: Console) -> tuple[Config, Planned]:
    """Configuration and plan with the actors on the cluster's cards, where it has any and none is placed by hand.

    Hot experts of `experts.recorded_load` get further replicas on cards that remain. This process is connected to the
    cluster. Raises `ConfigError` saying what is missing where the cards do not hold the model.
    """
    if by_hand(config) or not (cards := cluster_cards()):
        return config, plan
    return placed_on(config, directory, plan, console, cards)


def placed_on(
    config: Config, directory: Path, plan: Planned, console: Console, cards: Sequence[Card]
) -> tuple[Config, Planned]:
    """`on_cluster_cards` for these cards. Raises `ConfigError` as it does."""
    plan = planned(config, directory, without_weights=not plan.bytes_to_read, cards=True)
    parts, fixed = parts_of(config, plan.plan), config.engine.kv_cache_gib is not None
    rows = recorded_rows(config, plan.model)
    added: dict[int, int] = {}
    try:
        if rows is None:
            placement = place(cards, parts, fixed)
        else:
            placement, added = with_hot_experts(cards, parts, rows, fixed)
    except ConfigError as error:
        largest = max(parts, key=need_of)
        formats = [each for each in FORMATS if _fits(config, {"quantize": each}, plan, cards)]
        offload = _offload(config, plan, cards)
        help_ = would_fit(formats, offload, largest.weight_bytes + largest.cache_bytes, largest.name)
        raise ConfigError(f"{error}; {help_}") from None
    config = on_cards(config, plan.plan, placement, cards)
    if added:
        config = config.model_copy(update={"experts": config.experts.with_replicas(added)})
    if config.model.dtype not in ("auto", plan.plan.dtype):
        plan = planned(config, directory, without_weights=not plan.bytes_to_read, cards=True)
    notes = placement_notes(placement, lacking_bfloat16(placement, cards), plan.plan.dtype, added)
    print_placement(console, placement, cards, notes)
    return config, plan


def _offload(config: Config, plan: Planned, cards: Sequence[Card]) -> float | None:
    """The least of `OFFLOADS` of the largest expert actor, in GiB, with which the cards hold the model; None: none."""
    largest = max((actor.weight_bytes for actor in plan.plan.actors if experts_in(actor.name)), default=0)
    tried = (round(share * largest / GIB, 2) for share in OFFLOADS)
    return next((gib for gib in tried if gib and _fits(config, {"cpu_offload_gib": gib}, plan, cards)), None)


def _fits(config: Config, changed: dict[str, str | float], plan: Planned, cards: Sequence[Card]) -> bool:
    """Whether the cards hold the model with these keys of `experts` changed."""
    other = config.model_copy(update={"experts": config.experts.model_copy(update=changed)})
    try:
        made = planned(other, plan.directory, without_weights=not plan.bytes_to_read, cards=True)
        place(cards, parts_of(other, made.plan), config.engine.kv_cache_gib is not None)
    except ConfigError:
        return False
    return True
