"""The cards of a Ray cluster, and a configuration that uses them; what an actor without a card computes on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_ray.config import Config
from moe_ray.config.actors import ActorOptions
from moe_ray.config.experts import ExpertsSection
from moe_ray.deploy.variants import TRUNK_OF
from moe_ray.errors import CardDriverUnavailable
from moe_ray.experts.planning.card_placement import CardPlacement, PlacedPart
from moe_ray.experts.planning.card_table import has_bfloat16, sheet_of
from moe_ray.experts.planning.cards import GIB, MEMORY_LABEL, Card, Part, memory_of
from moe_ray.experts.planning.footprint import LEAST_CACHE_TOKENS, ActorPlan, Plan
from moe_ray.experts.planning.placement import experts_in
from moe_ray.model.compute.card_driver import memory_of_cards

KIND_LABEL: Final = "ray.io/accelerator-type"
"""Label by which Ray names the kind of a node's cards."""
NODE_LABEL: Final = "ray.io/node-id"
"""Label by which Ray names a node: of a node that comes in its place it is another."""
SPEED_LABEL: Final = "moe-ray/gpu-read-gb-s"
"""Label of a Ray node: GB/s that each of its cards reads of its memory, where it was measured."""
KIND_RESOURCE: Final = "accelerator_type:"
ASK_TIMEOUT_S: Final = 30.0


def cards_of(nodes: Sequence[Mapping[str, Any]]) -> list[Card]:
    """The cards of the living nodes among what `ray.nodes()` returns."""
    found = []
    for node in nodes:
        resources, labels = node.get("Resources") or {}, node.get("Labels") or {}
        if not node.get("Alive"):
            continue
        named = (name.removeprefix(KIND_RESOURCE) for name in resources if name.startswith(KIND_RESOURCE))
        kind = labels.get(KIND_LABEL) or next(named, None)
        memory = memory_of(kind, labels.get(MEMORY_LABEL))
        card = Card(node["NodeID"], kind, memory, _read_gb_s(kind, memory, labels.get(SPEED_LABEL)))
        found += [card] * int(resources.get("GPU", 0))
    return found


def cluster_cards() -> list[Card]:
    """The cards of the cluster that this process is connected to; nodes are asked for memory that Ray cannot tell."""
    cards = cards_of(ray.nodes())
    unknown = sorted({card.node for card in cards if card.memory is None})
    measured = _measured(unknown) if unknown else {}
    return [replace(card, memory=measured[card.node]) if card.node in measured else card for card in cards]


def by_hand(config: Config) -> bool:
    """Whether the configuration says itself which actors have cards, or that all of them compute on CPUs."""
    experts = config.experts
    actors = (config.trunk, experts, *experts.spares)
    devices = [each.device for each in actors]
    devices += [override["device"] for override in experts.overrides.values() if "device" in override]
    return (
        all((device or config.model.device) == "cpu" for device in devices)
        or any(actor.num_gpus is not None for actor in actors)
        or any(variant.num_gpus is not None for variant in config.variants)
        or any(override.get("num_gpus") is not None for override in experts.overrides.values())
    )


def parts_of(config: Config, plan: Plan) -> list[Part]:
    """The deployments of `config` as parts that want a card each; `plan` is in the dtype of the cards.

    Those that compute on CPUs are left out.
    """
    trunk, *rest = plan.actors
    cache = _least_cache(config, plan, trunk)
    if config.transport == "local":
        whole = trunk.weight_bytes + plan.draft_bytes + sum(actor.card_bytes for actor in rest if not actor.spare)
        return [Part(trunk.name, whole, config.trunk.num_replicas, cache)]
    trunk_bytes = trunk.weight_bytes + plan.draft_bytes
    found: list[tuple[ActorOptions, Part]] = []
    found.append((config.trunk, Part(trunk.name, trunk_bytes, config.trunk.num_replicas, cache)))
    for own in config.for_variants:
        variant = rest.pop(0)
        nbytes = variant.weight_bytes + plan.draft_bytes
        found.append((own.trunk, Part(variant.name, nbytes, own.trunk.num_replicas, _least_cache(own, plan, variant))))
    spares = iter(config.experts.spares)
    for actor in rest:
        options = next(spares) if actor.spare else config.experts.of(experts_in(actor.name)[0])
        found.append((options, Part(actor.name, actor.card_bytes, options.num_replicas)))
    return [part for options, part in found if (options.device or config.model.device) != "cpu"]


def _least_cache(config: Config, plan: Plan, trunk: ActorPlan) -> int:
    """Bytes of KV cache that a trunk needs at least, or has as it is configured."""
    if config.engine.kv_cache_gib is not None:
        return int(config.engine.kv_cache_gib * GIB)
    return min(LEAST_CACHE_TOKENS, config.model.max_model_len or plan.context) * trunk.kv_bytes_per_token


def on_cards(config: Config, plan: Plan, placement: CardPlacement, cards: Sequence[Card]) -> Config:
    """`config` with the share of a card, the nodes and the budget of every actor, as `placement` says.

    The dtype is made one that all of them compute in: float16 where a card has no bfloat16.
    """
    changes: dict[str, Any] = {}
    trunk = placement.of("Trunk")
    if trunk is not None:
        changes["trunk"] = config.trunk.model_copy(update=_asked(trunk, config.trunk))
        if trunk.cache_bytes is not None:
            gib = int(1000 * trunk.cache_bytes / GIB) / 1000
            changes["engine"] = config.engine.model_copy(update={"kv_cache_gib": gib})
    variants = []
    for variant, own in zip(config.variants, config.for_variants, strict=True):
        placed = placement.of(TRUNK_OF.format(variant.name))
        variants.append(variant if placed is None else variant.model_copy(update=_asked_of_variant(placed, own.trunk)))
    if variants:
        changes["variants"] = tuple(variants)
    if config.transport != "local":
        changes["experts"] = _experts_on_cards(config.experts, plan, placement)
    dtype = dtype_for(config, plan, placement, cards)
    if dtype != config.model.dtype:
        changes["model"] = config.model.model_copy(update={"dtype": dtype})
    return config.model_copy(update=changes)


def dtype_for(config: Config, plan: Plan, placement: CardPlacement, cards: Sequence[Card]) -> str:
    """`model.dtype` for these cards: float16 where one has no bfloat16; one for all where CPUs compute, too."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if plan.dtype == "bfloat16" and any(lacking_bfloat16(placement, cards)):
        return "float16"
    return plan.dtype if len(placement.placed) < len(plan.actors) and config.transport != "local" else "auto"


def lacking_bfloat16(placement: CardPlacement, cards: Sequence[Card]) -> list[str]:
    """The kinds of cards without bfloat16 that actors may be on."""
    kinds = {
        card.kind
        for placed in placement.placed
        for card in cards
        if (not placed.nodes or card.node in placed.nodes) and (not placed.kinds or card.kind in placed.kinds)
    }
    return sorted(kind for kind in kinds if kind is not None and not has_bfloat16(kind))


def _experts_on_cards(experts: ExpertsSection, plan: Plan, placement: CardPlacement) -> ExpertsSection:
    """The section with what most of its actors get, and an override for each that gets something else."""
    mine = {actor.name: placement.of(actor.name) for actor in plan.actors if experts_in(actor.name)}
    counts = Counter(_told(placed) for placed in mine.values() if placed is not None)
    usual = next((p for p in mine.values() if p and _told(p) == counts.most_common(1)[0][0]), None)
    update = {} if usual is None else _asked(usual, experts)
    overrides: dict[int, Mapping[str, Any]] = dict(experts.overrides)
    for name, placed in mine.items():
        said = next((experts.overrides[e] for e in experts_in(name) if e in experts.overrides), {})
        if placed is None:
            none = {"num_gpus": 0, "labels": dict(experts.labels), "gpu_memory_gib": experts.gpu_memory_gib}
            ours: Mapping[str, Any] = {} if usual is None else none
        elif _told(placed) == _told(usual) and "labels" not in said:
            continue
        else:
            ours = _asked(placed, experts)
        kept = {key: said[key] for key in ("gpu_memory_gib",) if key in said}
        if "labels" in said:
            kept["labels"] = {**ours.get("labels", {}), **said["labels"]}
        overrides.update({expert: {**said, **ours, **kept} for expert in experts_in(name) if ours})
    spares = []
    for number, spare in enumerate(experts.spares):
        where = placement.of(f"Spare{number}")
        spares.append(spare if where is None else spare.model_copy(update=_asked(where, spare)))
    return experts.model_copy(update={**update, "overrides": overrides, "spares": tuple(spares)})


def _told(placed: PlacedPart | None) -> tuple[object, ...]:
    return () if placed is None else (placed.num_gpus, placed.nodes, placed.kinds, placed.budget_bytes)


def _asked(placed: PlacedPart, section: ActorOptions) -> dict[str, Any]:
    """The keys of a section that put its actors where `placed` says; what it says itself of labels and budget wins."""
    labels = {}
    if placed.nodes:
        labels[NODE_LABEL] = _selector(placed.nodes)
    elif placed.kinds:
        labels[KIND_LABEL] = _selector(placed.kinds)
    budget = section.gpu_memory_gib
    if budget is None and placed.budget_bytes is not None:
        budget = int(1000 * placed.budget_bytes / GIB) / 1000
    return {"num_gpus": placed.num_gpus, "labels": {**labels, **section.labels}, "gpu_memory_gib": budget}


def _asked_of_variant(placed: PlacedPart, trunk: ActorOptions) -> dict[str, Any]:
    """The keys of a variant that put its trunks on cards; labels are those of all trunks."""
    asked = _asked(placed, trunk)
    told = {"num_gpus": asked["num_gpus"], "gpu_memory_gib": asked["gpu_memory_gib"]}
    if placed.cache_bytes is not None:
        told["kv_cache_gib"] = int(1000 * placed.cache_bytes / GIB) / 1000
    return told


def hide_cards_of_others(device: str) -> None:
    """Let this actor compute on the CPU if Ray has given it no card, unless `device` is cuda.

    Call it before CUDA is used: since 2.50, Ray leaves all cards of a node visible to an actor that asked for none.
    """
    if device != "cuda" and not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _read_gb_s(kind: str | None, memory: int | None, label: str | None) -> float | None:
    """What a card reads: as its node's label says, else its data sheet; None where neither tells."""
    try:
        told = float(label) if label else 0.0
    except ValueError:
        told = 0.0
    sheet = sheet_of(kind, memory)
    return told if told > 0 else None if sheet is None else sheet.read_gb_s


def _measured(node_ids: Sequence[str]) -> dict[str, int]:
    """Memory of the cards of each node, asked on the node itself; nodes that cannot tell are left out."""
    ask = ray.remote(num_cpus=0)(_smallest_card)
    tasks = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in node_ids
    }
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=ASK_TIMEOUT_S)
    for task in late:
        ray.cancel(task)
    found = {}
    for task in done:
        try:
            memory = ray.get(task)
        except RayError:  # the node went meanwhile: its cards stay of unknown memory
            continue
        if memory is not None:
            found[tasks[task]] = memory
    return found


def _smallest_card() -> int | None:
    try:
        return min(memory_of_cards())
    except CardDriverUnavailable:
        return None


def _selector(kinds: Sequence[str]) -> str:
    return kinds[0] if len(kinds) == 1 else f"in({', '.join(kinds)})"
