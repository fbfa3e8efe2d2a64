"""The profiles of the chart for cards: what they promise fits, by the figures that `moe-ray plan` goes by."""

from __future__ import annotations

from pathlib import Path

import pytest
from helm_rendering import Rendered, profile, render

from moe_ray.commands.planned import planned
from moe_ray.config import Config, load_config
from moe_ray.config.actors import ActorOptions
from moe_ray.deploy.cards import parts_of
from moe_ray.experts.planning.card_placement import place
from moe_ray.experts.planning.cards import GIB, PROCESS_BYTES, RESERVE, Card, Part, fullest
from moe_ray.experts.planning.placement import experts_in

MIXTRAL = Path(__file__).parents[2] / "examples" / "mixtral-8x7b" / "config.json"
CARD_GIB = {
    "NVIDIA-L4": 24,
    "Tesla-T4": 16,
    "NVIDIA-GeForce-RTX-4060": 8,
    "NVIDIA-GeForce-RTX-3060": 12,
    "NVIDIA-A100-SXM4-80GB": 80,
    None: 48,  # one-big-node says so in its first line
}
"""By the node label of a worker group."""
PROFILES = {
    "mixtral-8x7b-fp16-8x16gb": None,
    "mixtral-8x7b-int8-8x8gb": "int8",
    "mixtral-8x7b-int4-4x12gb": "int4",
    "mixtral-8x7b-int4-1x80gb": "int4",
    "one-big-node": None,
}
"""Profile -> what its experts are held as; None: floats of 16 bits."""


def options_of(config: Config, part: Part) -> ActorOptions:
    return config.trunk if part.name == "Trunk" else config.experts.of(experts_in(part.name)[0])


def cards_of_groups(rendered: Rendered) -> dict[str, list[Card]]:
    """Role of a worker group -> its cards at the start."""
    found: dict[str, list[Card]] = {}
    for group in rendered.groups.values():
        if "groupName" not in group:
            continue  # the head, which has none
        pod = group["template"]["spec"]
        kind = (pod.get("nodeSelector") or {}).get("nvidia.com/gpu.product")
        count = int(pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
        role = group["labels"]["moe-ray/role"]
        pods = range(group["replicas"])
        found.setdefault(role, []).extend(
            Card(f"{role}{number}", kind, CARD_GIB[kind] * GIB) for number in pods for _ in range(count)
        )
    return found


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_fits_its_cards(name: str) -> None:
    rendered = render(profile(name))
    config = load_config(rendered.application["args"])
    plan = planned(config, MIXTRAL, without_weights=True, cards=True).plan
    parts = parts_of(config, plan)
    assert {each.held_as[0] for each in plan.actors[1:]} == {PROFILES[name] or "float16"}
    by_role = cards_of_groups(rendered)
    for role, cards in by_role.items():
        here = [part for part in parts if role in ("any", "trunk" if part.name == "Trunk" else "experts")]
        shares = {options_of(config, part).num_gpus for part in here}
        assert len(shares) == 1, "Ray may place them in any order"
        per_card = int(1 / (shares.pop() or 1))
        assert len(cards) * per_card >= sum(part.replicas for part in here)
        memory = min(card.memory or 0 for card in cards)
        assert fullest(here, per_card) <= memory * (1 - RESERVE)
        budgets = sorted((int((options_of(config, part).gpu_memory_gib or 0) * GIB) for part in here), reverse=True)
        assert sum(budgets[:per_card]) + per_card * PROCESS_BYTES <= memory
        for part in here:
            budget = options_of(config, part).gpu_memory_gib
            assert (budget is None) == (per_card == 1)
            assert budget is None or part.weight_bytes + part.cache_bytes <= budget * GIB
    assert place([card for cards in by_role.values() for card in cards], parts, cache_is_fixed=True).placed


def test_every_profile_with_cards_is_checked() -> None:
    from helm_rendering import PROFILES as ALL

    names = {path.stem.removesuffix("-values") for path in ALL}
    with_cards = {name for name in names if "nvidia.com/gpu" in str(render(profile(name)).manifests)}
    assert with_cards - set(PROFILES) == {"everything"}
