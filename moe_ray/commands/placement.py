"""Puts the actors of a server on the cards of the cluster that it is deployed to, and says so."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from moe_ray.commands.planned import Planned, planned
from moe_ray.config import Config
from moe_ray.deploy.cards import by_hand, cluster_cards, on_cards
from moe_ray.experts.planning.cards import explain


def on_cluster_cards(config: Config, directory: Path, plan: Planned, console: Console) -> tuple[Config, Planned]:
    """Configuration and plan with the actors on the cluster's cards, where it has any and none is placed by hand.

    This process is connected to the cluster. Raises `ConfigError` saying what is missing where the cards do not hold
    the model.
    """
    if by_hand(config) or not (cards := cluster_cards()):
        return config, plan
    plan = planned(config, directory, without_weights=not plan.bytes_to_read, cards=True)
    config, shares = on_cards(config, plan.plan, cards)
    console.print(explain(shares), markup=False, soft_wrap=True)
    return config, plan
