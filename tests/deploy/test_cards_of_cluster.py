"""From what Ray reports of its nodes to a configuration whose actors have cards. No Ray is started."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_ray.commands.placement import placed_on
from moe_ray.commands.planned import planned
from moe_ray.config import Config, load_config
from moe_ray.deploy import cards as deploy_cards
from moe_ray.deploy.app import build_app
from moe_ray.deploy.cards import (
    KIND_LABEL,
    NODE_LABEL,
    SPEED_LABEL,
    by_hand,
    cards_of,
    hide_cards_of_others,
    on_cards,
    parts_of,
)
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.card_placement import place
from moe_ray.experts.planning.cards import GIB, MEMORY_LABEL, PROCESS_BYTES, RESERVE, Card
from moe_ray.experts.planning.footprint import Plan, make_plan
from moe_ray.experts.planning.placement import holdings
from moe_ray.experts.server.expert_memory import ExpertMemory
from moe_ray.model.model_config import ModelConfig

ROOT = Path(__file__).parents[2]
MIXTRAL = ROOT / "examples" / "mixtral-8x7b" / "config.json"
DOCS = ROOT / "docs" / "scaling-and-placement.md"


def node(gpus: float, alive: bool = True, labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    return {"NodeID": "n", "Alive": alive, "Resources": {"GPU": gpus, "CPU": 8.0, **resources}, "Labels": labels or {}}


def plan_of(directory: Path, config: Config, dtype: str = "bfloat16") -> Plan:
    model = ModelConfig.load(directory)
    layers, experts = model.num_hidden_layers, model.num_local_experts
    spares = config.experts.spare_keys(layers, experts)
    return make_plan(model, dtype, holdings(layers, experts, config.experts.group_size, spares))


def test_cards_that_ray_reports() -> None:
    t4 = Card("n", "T4", 16 * GIB, 320)
    assert cards_of([node(2, labels={KIND_LABEL: "T4"})]) == [t4, t4]
    assert cards_of([node(1, **{"accelerator_type:T4": 1.0})]) == [t4]
    assert cards_of([node(1, labels={KIND_LABEL: "T4", MEMORY_LABEL: "15"})]) == [Card("n", "T4", 15 * GIB, 320)]
    assert cards_of([node(1, labels={KIND_LABEL: "T4", SPEED_LABEL: "250"})]) == [Card("n", "T4", 16 * GIB, 250)]
    assert cards_of([node(1)]) == [Card("n", None, None)]
    assert cards_of([node(2, alive=False), node(0), {"NodeID": "n", "Alive": True}]) == []


@pytest.mark.parametrize(
    "flags",
    [
        {"model": {"device": "cpu"}},
        {"trunk": {"num_gpus": 0}},
        {"experts": {"num_gpus": 0.5}},
        {"experts": {"overrides": {3: {"num_gpus": 1}}}},
        {"experts": {"spares": [{"experts": {3: "all"}, "num_gpus": 1}]}},
        {"variants": [{"name": "tuned", "path": "/m", "num_gpus": 0.5}]},
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


def put(config: Config, plan: Plan, cards: list[Card]) -> Config:
    return on_cards(config, plan, place(cards, parts_of(config, plan), config.engine.kv_cache_gib is not None), cards)


def test_the_graph_asks_for_the_planned_cards(random_model: Path) -> None:
    flags = {
        "model": {"path": str(random_model)},
        "experts": {"overrides": {3: {"num_replicas": 2}}, "spares": [{"experts": {0: "all"}}], "labels": {"a": "b"}},
    }
    config = load_config(flags)
    assert {graph_gpus(config)[name] for name in ("Trunk", "Expert0", "Spare0")} == {0}
    placed = put(config, plan_of(random_model, config), [Card("n", "A10G", 24 * GIB)] * 5)
    gpus = graph_gpus(placed)
    assert gpus.pop("Gateway") == 0
    assert gpus.pop("Trunk") == 1
    assert set(gpus.values()) == {0.3333}, "ten actors on four cards"
    assert placed.trunk.gpu_memory_gib is placed.engine.kv_cache_gib is None, "the card is the trunk's alone"
    assert placed.experts.of(3).num_replicas == 2
    assert dict(placed.experts.labels) == {"a": "b"}
    assert placed.experts.gpu_memory_gib == placed.experts.spares[0].gpu_memory_gib is not None


def test_a_trunk_that_shares_a_card_has_a_budget_and_a_cache(random_model: Path) -> None:
    config = load_config({"model": {"path": str(random_model)}})
    placed = put(config, plan_of(random_model, config), [Card("n", "A10G", 24 * GIB)])
    assert set(graph_gpus(placed).values()) == {0, 0.1111}
    assert placed.engine.kv_cache_gib is not None
    assert placed.trunk.gpu_memory_gib is not None
    assert placed.experts.gpu_memory_gib is not None
    assert placed.trunk.gpu_memory_gib > placed.engine.kv_cache_gib
    assert placed.trunk.gpu_memory_gib + 8 * placed.experts.gpu_memory_gib + 9 * 0.5 <= 24


def test_trunks_of_several_models_have_shares_by_their_bytes(random_model: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    tuned.symlink_to(random_model)
    variants = [{"name": "tuned", "path": str(tuned)}, {"name": "two", "path": str(tuned), "num_trunks": 2}]
    config = load_config({"model": {"path": str(random_model)}, "variants": variants, "cache_dir": str(tmp_path)})
    plan = planned(config, random_model, cards=True).plan
    assert [part.name for part in parts_of(config, plan)[:4]] == ["Trunk", "Trunk-tuned", "Trunk-two", "Expert0"]
    placed = put(config, plan, [Card("n", "small", 3 * GIB)] * 4)
    gpus = graph_gpus(placed)
    assert gpus.pop("Gateway") == 0
    assert gpus["Trunk"] == gpus["Trunk-tuned"] == gpus["Trunk-two"] > gpus["Expert0"] > 0
    assert sum(gpus.values()) + gpus["Trunk-two"] <= 4
    made = graph(placed)
    for name, own in zip(("Trunk-tuned", "Trunk-two"), placed.for_variants, strict=True):
        given = made[name].init_args[0]
        assert (given.trunk, given.engine, given.model.path) == (own.trunk, own.engine, str(tuned))
        assert own.trunk.num_gpus == gpus[name]
        assert own.engine.kv_cache_gib is not None
        assert own.trunk.gpu_memory_gib is not None
        assert own.trunk.gpu_memory_gib > own.engine.kv_cache_gib
    by_hand_too = load_config({"variants": [{"name": "a", "path": "/m", "gpu_memory_gib": 2, "kv_cache_gib": 1}]})
    (own,) = by_hand_too.for_variants
    assert (own.trunk.gpu_memory_gib, own.engine.kv_cache_gib, own.trunk.num_gpus) == (2, 1, None)


def test_small_cards_are_avoided_by_label(random_model: Path) -> None:
    config = load_config({"model": {"path": str(random_model)}})
    cards = [*(Card(f"a{i}", "L4", 24 * GIB) for i in range(9)), Card("b", "P4", GIB // 4)]
    placed = put(config, plan_of(random_model, config), cards)
    assert placed.trunk.labels[NODE_LABEL] == "a0"
    assert placed.experts.labels[NODE_LABEL] == "in(a1, a2, a3, a4, a5, a6, a7, a8)"


def test_unlike_experts_have_overrides_of_their_own(random_model: Path) -> None:
    own = {2: {"quantize": "int8", "labels": {"zone": "x"}}, 4: {"gpu_memory_gib": 7, "num_replicas": 2}}
    config = load_config({"model": {"path": str(random_model)}, "experts": {"overrides": own}})
    cards = [Card("a", "A100-80G", 80 * GIB), *[Card("b", "L4", 24 * GIB)] * 9]
    placed = put(config, plan_of(random_model, config), cards)
    assert dict(placed.trunk.labels) == {KIND_LABEL: "A100-80G"}
    assert dict(placed.experts.of(2).labels) == {KIND_LABEL: "L4", "zone": "x"}
    assert dict(placed.experts.of(1).labels) == {KIND_LABEL: "L4"}
    assert placed.experts.of(2).quantize == "int8"
    assert (placed.experts.of(4).gpu_memory_gib, placed.experts.of(1).gpu_memory_gib) == (7, None)


def test_experts_on_cpus_beside_a_trunk_on_a_card(random_model: Path) -> None:
    experts = {"labels": {"rack": "a"}, "overrides": {5: {"device": "cpu"}}}
    flags = {"model": {"path": str(random_model)}, "experts": experts}
    config = load_config(flags)
    assert not by_hand(config)
    plan = plan_of(random_model, config)
    assert [part.name for part in parts_of(config, plan)] == ["Trunk", *(f"Expert{e}" for e in range(8) if e != 5)]
    placed = put(config, plan, [Card("n", "A10G", 24 * GIB)] * 8)
    gpus = graph_gpus(placed)
    assert (gpus["Expert5"], gpus["Expert4"], gpus["Trunk"]) == (0, 1, 1)
    assert dict(placed.experts.of(5).labels) == {"rack": "a"}
    assert placed.model.dtype == "bfloat16", "both compute in one dtype, whatever the CPU would choose"
    whole = load_config({**flags, "experts": {"device": "cpu"}})
    placed = put(whole, plan, [Card("n", "A10G", 24 * GIB)])
    assert {graph_gpus(placed)[name] for name in ("Trunk", "Expert0")} == {1, 0}
    assert by_hand(load_config({"trunk": {"device": "cpu"}, "experts": {"device": "cpu"}}))
    assert not by_hand(load_config({"model": {"device": "cpu"}, "trunk": {"device": "cuda"}}))


def test_the_graph_tells_each_actor_where_it_computes(random_model: Path) -> None:
    flags = {"model": {"path": str(random_model)}, "experts": {"device": "cpu", "overrides": {1: {"device": "cuda"}}}}
    found = graph(load_config({**flags, "trunk": {"device": "cuda"}}))
    devices = {name: deployment.init_args[0].model.device for name, deployment in found.items()}
    assert [devices[name] for name in ("Trunk", "Expert0", "Expert1", "Gateway")] == ["cuda", "cpu", "cuda", "auto"]


def test_cards_without_bfloat16_compute_in_float16(random_model: Path) -> None:
    config = load_config({"model": {"path": str(random_model)}})
    plan = plan_of(random_model, config)
    t4s = [Card("n", "T4", 16 * GIB)] * 4
    assert put(config, plan, t4s).model.dtype == "float16"
    assert put(config, plan, [Card("n", "L4", 24 * GIB)] * 4).model.dtype == "auto"
    said = load_config({"model": {"path": str(random_model), "dtype": "bfloat16"}})
    assert put(said, plan, t4s).model.dtype == "bfloat16", "what is said is not changed"


def test_the_start_prints_actors_cards_and_budgets() -> None:
    config = load_config({"model": {"path": str(MIXTRAL)}, "experts": {"quantize": "int4"}})
    plan = planned(config, MIXTRAL, without_weights=True)
    out = io.StringIO()
    placed, again = placed_on(config, MIXTRAL, plan, Console(file=out, width=100), [Card("n", "T4", 16 * GIB)] * 4)
    assert (placed.model.dtype, again.plan.dtype) == ("float16", "float16")
    lines = out.getvalue().splitlines()
    assert lines[0] == "4 cards (4 x T4, 16 GiB)"
    assert lines[1].split() == ["actors", "card", "share", "weights", "budget"]
    assert re.fullmatch(r"Trunk +T4 16 GiB +1 +2.99 GiB +the whole card", lines[2])
    assert re.fullmatch(r"Expert0 to Expert7 +T4 16 GiB +0.3333 +2.95 GiB +4.57 GiB", lines[3])
    assert lines[4] == "T4 has no bfloat16: all actors compute in float16"
    assert lines[5].startswith("up to 3 actors share a card: they take turns on it, unless CUDA MPS runs on its node")
    assert lines[2:4] == [line.rstrip() for line in DOCS.read_text().splitlines() if "T4 16 GiB  " in line]


def test_hot_experts_get_replicas_at_the_start(random_model: Path, tmp_path: Path) -> None:
    record = tmp_path / "load.json"
    record.write_text(json.dumps({"rows": [[80, 10, 10, 10, 10, 10, 10, 10]] * 4}))
    config = load_config({"model": {"path": str(random_model)}, "experts": {"recorded_load": str(record)}})
    out = io.StringIO()
    cards = [Card(f"n{i}", "L4", 24 * GIB) for i in range(11)]
    placed, _ = placed_on(config, random_model, planned(config, random_model), Console(file=out, width=100), cards)
    assert placed.experts.of(0).num_replicas == 3
    assert "for the recorded load, on cards that remained: expert 0 (2)" in out.getvalue()


def test_a_record_of_another_model_is_refused(random_model: Path, tmp_path: Path) -> None:
    record = tmp_path / "load.json"
    record.write_text(json.dumps({"rows": [[1, 2]]}))
    config = load_config({"model": {"path": str(random_model)}, "experts": {"recorded_load": str(record)}})
    with pytest.raises(ConfigError, match=r"load\.json: 1 layers of 2 experts, the model has 4 of 8"):
        build_app(config)
    record.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        build_app(config)


def test_the_graph_tells_each_actor_what_it_may_hold(random_model: Path, tmp_path: Path) -> None:
    record = tmp_path / "load.json"
    rows = [[float(layer + expert) for expert in range(8)] for layer in range(4)]
    record.write_text(json.dumps({"rows": rows}))
    experts = {"gpu_memory_gib": 2, "overrides": {1: {"cpu_offload_gib": 0.5}}, "recorded_load": str(record)}
    found = graph(load_config({"model": {"path": str(random_model)}, "experts": experts}))
    told = tuple(map(tuple, rows))
    assert found["Expert0"].init_args[-1] == ExpertMemory(2 * GIB, 0, told)
    assert found["Expert1"].init_args[-1] == ExpertMemory(2 * GIB, GIB // 2, told)


def test_what_does_not_fit_is_refused_with_the_formats_that_would(random_model: Path) -> None:
    config = load_config({"model": {"path": str(random_model), "dtype": "float32"}})
    made = planned(config, random_model)
    expert, trunk = made.plan.actors[1].weight_bytes, made.plan.actors[0].weight_bytes
    # A card that holds the trunk, and eight experts in int8 (a quarter of float32, and scales) but not as they are.
    room = 9 * PROCESS_BYTES + trunk + made.plan.kv_bytes_per_token * 2048 + 8 * expert // 3
    cards = [Card("n", "Homemade", int(room / (1 - RESERVE)) + 1)]
    with pytest.raises(ConfigError, match=r"experts in int8 or int4 would fit .* the smallest cards that hold Trunk"):
        placed_on(config, random_model, made, Console(file=io.StringIO()), cards)
    mixtral = load_config({"model": {"path": str(MIXTRAL)}})
    t4s = [Card(f"n{number}", "T4", 16 * GIB) for number in range(8)]
    with pytest.raises(ConfigError) as refused:
        placed_on(mixtral, MIXTRAL, planned(mixtral, MIXTRAL, True), Console(file=io.StringIO()), t4s)
    assert str(refused.value) in DOCS.read_text()
    (offload,) = re.findall(r"so would (\S+) GiB of each expert", str(refused.value))
    other = load_config({"model": {"path": str(MIXTRAL)}, "experts": {"cpu_offload_gib": offload}})
    assert placed_on(other, MIXTRAL, planned(other, MIXTRAL, True), Console(file=io.StringIO()), t4s)
    for quantize in ("int8", "int4"):  # what is named does fit
        other = load_config({"model": dict(config.model), "experts": {"quantize": quantize}})
        placed, _ = placed_on(other, random_model, made, Console(file=io.StringIO()), cards)
        assert placed.experts.num_gpus == 0.1111


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


def graph(config: Config) -> dict[str, Any]:
    """The deployments of the graph, by name."""
    found: dict[str, Any] = {}
    waiting = [build_app(config)]
    while waiting:
        deployment = waiting.pop()._bound_deployment
        found[deployment.name] = deployment
        for argument in deployment.init_args:
            parts = argument if isinstance(argument, list) else [argument]
            waiting += [part for part in parts if hasattr(part, "_bound_deployment")]
    return found


def graph_gpus(config: Config) -> dict[str, float]:
    """Deployment → num_gpus, of the graph that is deployed."""
    found = {name: deployment.ray_actor_options.get("num_gpus", 0) for name, deployment in graph(config).items()}
    return json.loads(json.dumps(found))
