"""From what Ray reports of its nodes to a configuration whose actors have cards. No Ray is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_ray.config import Config, load_config
from moe_ray.deploy import cards as deploy_cards
from moe_ray.deploy.app import build_app
from moe_ray.deploy.cards import KIND_LABEL, by_hand, cards_of, hide_cards_of_others, on_cards, parse_memory, parts_of
from moe_ray.experts.planning.cards import GIB, MEMORY_LABEL, Card
from moe_ray.experts.planning.footprint import Plan, make_plan
from moe_ray.experts.planning.placement import holdings
from moe_ray.model.model_config import ModelConfig


def node(gpus: float, alive: bool = True, labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    return {"NodeID": "n", "Alive": alive, "Resources": {"GPU": gpus, "CPU": 8.0, **resources}, "Labels": labels or {}}


def plan_of(directory: Path, config: Config, dtype: str = "bfloat16") -> Plan:
    model = ModelConfig.load(directory)
    layers, experts = model.num_hidden_layers, model.num_local_experts
    spares = config.experts.spare_keys(layers, experts)
    return make_plan(model, dtype, holdings(layers, experts, config.experts.group_size, spares))


def test_cards_that_ray_reports() -> None:
    t4 = Card("n", "T4", 16 * GIB)
    assert cards_of([node(2, labels={KIND_LABEL: "T4"})]) == [t4, t4]
    assert cards_of([node(1, **{"accelerator_type:T4": 1.0})]) == [t4]
    assert cards_of([node(1, labels={KIND_LABEL: "T4", MEMORY_LABEL: "15"})]) == [Card("n", "T4", 15 * GIB)]
    assert cards_of([node(1)]) == [Card("n", None, None)]
    assert cards_of([node(2, alive=False), node(0), {"NodeID": "n", "Alive": True}]) == []


def test_what_nvidia_smi_lists() -> None:
    assert parse_memory("15360\n24576\n") == 15360 * 2**20
    assert parse_memory("") is parse_memory("[N/A]\n") is None


@pytest.mark.parametrize(
    "flags",
    [
        {"model": {"device": "cpu"}},
        {"trunk": {"num_gpus": 0}},
        {"experts": {"num_gpus": 0.5}},
        {"experts": {"overrides": {3: {"num_gpus": 1}}}},
        {"experts": {"spares": [{"experts": {3: "all"}, "num_gpus": 1}]}},
    ],
)
def test_what_the_configuration_says_by_hand_wins(flags: dict[str, Any]) -> None:
    assert by_hand(load_config(flags))


def test_nothing_said_is_not_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_RAY_TRUNK__DRAIN_S", "3")
    assert not by_hand(load_config({"experts": {"num_replicas": 2, "overrides": {3: {"num_replicas": 1}}}}))
    monkeypatch.setenv("MOE_RAY_TRUNK__NUM_GPUS", "0")
    assert by_hand(load_config())


def test_replicas_groups_and_spares_are_counted(random_model: Path) -> None:
    experts = {"num_replicas": 2, "experts_per_actor": 3, "spares": [{"experts": {0: "all"}, "num_replicas": 3}]}
    config = load_config({"model": {"path": str(random_model)}, "experts": experts, "trunk": {"num_replicas": 2}})
    parts = parts_of(config, plan_of(random_model, config))
    assert [(part.name, part.replicas) for part in parts] == [
        *(("Trunk", 2), ("Experts0-2", 2), ("Experts3-5", 2), ("Experts6-7", 2), ("Spare0", 3)),
    ]
    assert [part.cache_bytes > 0 for part in parts] == [True, False, False, False, False]
    whole = parts_of(load_config({"transport": "local"}), plan_of(random_model, config))
    assert [(part.name, part.weight_bytes) for part in whole] == [("Trunk", plan_of(random_model, config).total_bytes)]


def test_the_graph_asks_for_the_planned_cards(random_model: Path) -> None:
    flags = {
        "model": {"path": str(random_model)},
        "experts": {"overrides": {3: {"num_replicas": 2}}, "spares": [{"experts": {0: "all"}}], "labels": {"a": "b"}},
    }
    config = load_config(flags)
    assert {graph_gpus(config)[name] for name in ("Trunk", "Expert0", "Spare0")} == {0}
    mixed = [Card(f"n{i}", "T4", 16 * GIB) for i in range(4)]
    placed, shares = on_cards(config, plan_of(random_model, config), mixed)
    assert shares.per_card == 3
    gpus = graph_gpus(placed)
    assert gpus.pop("Gateway") == 0
    assert set(gpus.values()) == {0.3333}
    assert placed.engine.kv_cache_gib is not None
    assert placed.experts.of(3).num_replicas == 2
    assert dict(placed.experts.labels) == {"a": "b"}


def test_small_cards_are_avoided_by_label(random_model: Path) -> None:
    config = load_config({"model": {"path": str(random_model)}})
    cards = [*(Card(f"a{i}", "L4", 24 * GIB) for i in range(9)), Card("b", "P4", GIB // 4)]
    placed, _ = on_cards(config, plan_of(random_model, config), cards)
    assert dict(placed.trunk.labels) == dict(placed.experts.labels) == {KIND_LABEL: "L4"}


def test_an_actor_without_a_card_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    class Context:
        def get_accelerator_ids(self) -> dict[str, list[str]]:
            return {"GPU": given}

    monkeypatch.setattr(deploy_cards.ray, "get_runtime_context", Context)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    hide_cards_of_others("cuda")
    assert deploy_cards.os.environ["CUDA_VISIBLE_DEVICES"] == "0,1", "asked for by name"
    hide_cards_of_others("auto")
    assert deploy_cards.os.environ["CUDA_VISIBLE_DEVICES"] == ""
    given.append("1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    hide_cards_of_others("auto")
    assert deploy_cards.os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def graph_gpus(config: Config) -> dict[str, float]:
    """Deployment → num_gpus, of the graph that is deployed."""
    found: dict[str, float] = {}
    waiting = [build_app(config)]
    while waiting:
        deployment = waiting.pop()._bound_deployment
        found[deployment.name] = deployment.ray_actor_options.get("num_gpus", 0)
        for argument in deployment.init_args:
            parts = argument if isinstance(argument, list) else [argument]
            waiting += [part for part in parts if hasattr(part, "_bound_deployment")]
    return json.loads(json.dumps(found))
