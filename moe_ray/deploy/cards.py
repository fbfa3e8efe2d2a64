"""The cards of a Ray cluster, and a configuration that uses them; what an actor without a card computes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_ray.config import Config
from moe_ray.experts.planning.cards import GIB, MEMORY_LABEL, Card, Part, Shares, memory_of, share_cards
from moe_ray.experts.planning.footprint import LEAST_CACHE_TOKENS, Plan
from moe_ray.experts.planning.placement import experts_in

KIND_LABEL: Final = "ray.io/accelerator-type"
"""Label by which Ray names the kind of a node's cards."""
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
        card = Card(node["NodeID"], kind, memory_of(kind, labels.get(MEMORY_LABEL)))
        found += [card] * int(resources.get("GPU", 0))
    return found


def cluster_cards() -> list[Card]:
    """The cards of the cluster that this process is connected to; nodes are asked for memory that Ray cannot tell."""
    cards = cards_of(ray.nodes())
    unknown = sorted({card.node for card in cards if card.memory is None})
    measured = _measured(unknown) if unknown else {}
    return [Card(card.node, card.kind, measured.get(card.node)) if card.node in measured else card for card in cards]


def by_hand(config: Config) -> bool:
    """Whether the configuration says itself which actors have cards, or that they compute on CPUs."""
    experts = config.experts
    actors = (config.trunk, experts, *experts.spares)
    return (
        config.model.device == "cpu"
        or any(actor.num_gpus is not None for actor in actors)
        or any(override.get("num_gpus") is not None for override in experts.overrides.values())
    )


def parts_of(config: Config, plan: Plan) -> list[Part]:
    """The deployments of `config` as parts that want a card each; `plan` is in the dtype of the cards."""
    trunk, *rest = plan.actors
    if config.engine.kv_cache_gib is not None:
        cache = int(config.engine.kv_cache_gib * GIB)
    else:
        longest = config.model.max_model_len or plan.context
        cache = min(LEAST_CACHE_TOKENS, longest) * plan.kv_bytes_per_token
    if config.transport == "local":
        return [Part(trunk.name, plan.total_bytes, config.trunk.num_replicas, cache)]
    parts = [Part(trunk.name, trunk.weight_bytes, config.trunk.num_replicas, cache)]
    spares = iter(config.experts.spares)
    for actor in rest:
        options = next(spares) if actor.spare else config.experts.of(experts_in(actor.name)[0])
        parts.append(Part(actor.name, actor.weight_bytes, options.num_replicas))
    return parts


def on_cards(config: Config, plan: Plan, cards: Sequence[Card]) -> tuple[Config, Shares]:
    """`config` with a share of a card for every actor, and the shares. Raises `ConfigError` naming what is missing."""
    shares = share_cards(cards, parts_of(config, plan), config.engine.kv_cache_gib is not None)
    labels = {} if not shares.kinds else {KIND_LABEL: _selector(shares.kinds)}

    def placed(section: Any) -> Any:
        return section.model_copy(update={"num_gpus": shares.num_gpus, "labels": {**labels, **section.labels}})

    spares = tuple(map(placed, config.experts.spares))
    changes: dict[str, Any] = {
        "trunk": placed(config.trunk),
        "experts": placed(config.experts).model_copy(update={"spares": spares}),
    }
    if shares.cache_bytes is not None:
        gib = round(shares.cache_bytes / GIB, 3)
        changes["engine"] = config.engine.model_copy(update={"kv_cache_gib": gib})
    return config.model_copy(update=changes), shares


def hide_cards_of_others(device: str) -> None:
    """Let this actor compute on the CPU if Ray has given it no card, unless `device` is cuda.

    Call it before CUDA is used: since 2.50, Ray leaves all cards of a node visible to an actor that asked for none.
    """
    if device != "cuda" and not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def parse_memory(text: str) -> int | None:
    """The smallest card's memory in bytes, from nvidia-smi's list in MiB, a line a card; None where it names none."""
    sizes = [int(line) for line in map(str.strip, text.splitlines()) if line.isdigit()]
    return min(sizes) * 2**20 if sizes else None


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
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_memory(done.stdout)


def _selector(kinds: Sequence[str]) -> str:
    return kinds[0] if len(kinds) == 1 else f"in({', '.join(kinds)})"
