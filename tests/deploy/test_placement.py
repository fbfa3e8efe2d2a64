"""Experts that share an actor, and a spare: the plain model's tokens, rows where they belong, scaled as one."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from served import Served, by_hand, complete, deploy, eventually, kill, statuses

from moe_ray.config import load_config
from moe_ray.core import ExpertKey
from moe_ray.deploy.app import build_app
from moe_ray.errors import ConfigError

GROUPS = ["Experts0-1", "Experts2-3", "Experts4-5", "Experts6-7"]
LAYERS, TOP_K = 4, 2
SPARE = {1: "1-2", 2: "3", 6: "all"}
SPARE_KEYS = {(1, 1), (2, 1), (3, 2), *((layer, 6) for layer in range(LAYERS))}
PROMPTS = [list(range(3, 40)), list(range(100, 164)), [7], list(range(500, 300, -3))]


@pytest.fixture(scope="module")
def grouped(served_random: Served, http_port: int) -> Iterator[Served]:
    """The model of `served_random`, two experts an actor and one spare."""
    from ray import serve

    flags = {
        "model": {"path": served_random.config.model.path, "served_name": "random"},
        "experts": {"experts_per_actor": 2, "spares": [{"experts": SPARE}], "refresh_s": 1},
    }
    yield deploy("grouped", http_port, flags)
    serve.delete("grouped")


def tokens(served: Served, prompt: list[int]) -> list[str]:
    """The greedy answer token by token: text could hide a changed one."""
    body = {"prompt": prompt, "max_tokens": 40, "ignore_eos": True, "temperature": 0, "logprobs": 0}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["logprobs"]["tokens"]


def computed(status: dict[str, Any]) -> dict[ExpertKey, int]:
    """Rows of each key in the last seconds, by a replica's own word; those without rows left out."""
    rows = status["load"]["rows_per_layer"]
    return {(layer, expert): n for expert, layers in rows.items() for layer, n in enumerate(layers) if n}


def overview(served: Served) -> list[dict[str, Any]]:
    return httpx.get(f"{served.url}/experts", timeout=30, trust_env=False).json()["experts"]


def test_the_tokens_are_those_of_the_plain_model(served_random: Served, grouped: Served) -> None:
    for prompt in PROMPTS:
        expected = tokens(served_random, prompt)
        assert len(expected) == 40
        assert tokens(grouped, prompt) == expected


def test_every_actor_computes_for_its_keys_and_no_others(grouped: Served) -> None:
    def spare_is_used() -> bool:
        tokens(grouped, PROMPTS[1])
        (status,) = statuses(grouped, "Spare0")
        return set(computed(status)) == SPARE_KEYS

    eventually(spare_is_used, 30)
    (status,) = statuses(grouped, "Spare0")
    assert set(computed(status)) <= SPARE_KEYS
    assert set(status["load"]["rows_per_layer"]) == {1, 2, 6}
    assert status["weight_bytes"] * 2 * LAYERS == statuses(grouped, GROUPS[0])[0]["weight_bytes"] * len(SPARE_KEYS)
    for name in GROUPS:
        (status,) = statuses(grouped, name)
        first = int(name.removeprefix("Experts")[0])
        assert {expert for _, expert in computed(status)} <= {first, first + 1}


def test_the_experts_route_tells_rows_by_expert(grouped: Served) -> None:
    eventually(lambda: not any(sum(expert["rows_per_layer"]) for expert in overview(grouped)), 20)
    prompt = list(range(300, 340))
    tokens(grouped, prompt)
    experts = overview(grouped)
    assert [expert["expert"] for expert in experts] == list(range(8))
    sums = [sum(expert["rows_per_layer"][layer] for expert in experts) for layer in range(LAYERS)]
    least = TOP_K * (len(prompt) + 40 - 1)
    assert all(least <= total <= 1.2 * least for total in sums), "a late call may be sent twice"
    for expert in experts:
        group = GROUPS[expert["expert"] // 2]
        spare = ["Spare0"] if expert["expert"] in SPARE else []
        assert [replica["deployment"] for replica in expert["replicas"]] == [group, *spare]
        for replica in expert["replicas"]:
            held = (
                range(LAYERS)
                if replica["deployment"] == group
                else [la for la, e in SPARE_KEYS if e == expert["expert"]]
            )
            assert {layer for layer, n in enumerate(replica["rows_per_layer"]) if n} <= set(held)
        by_layer = zip(*(replica["rows_per_layer"] for replica in expert["replicas"]), strict=True)
        assert [sum(rows) for rows in by_layer] == expert["rows_per_layer"]


def test_status_lists_groups_and_spares(grouped: Served) -> None:
    from moe_ray.deploy import status

    tokens(grouped, PROMPTS[0])
    snapshot = status.collect(name=grouped.app_name)
    names = ["Gateway", "Trunk", *GROUPS, "Spare0"]
    assert [row["name"] for row in snapshot["deployments"]] == names
    said = io.StringIO()
    status.print_status(Console(file=said, width=80, highlight=False), snapshot)
    assert all(len(line) <= 80 for line in said.getvalue().splitlines())
    _, load = said.getvalue().split("\n\n")
    assert [line.split()[0] for line in load.splitlines()[1:-1]] == names[2:]


def test_a_spare_that_dies_is_not_missed(grouped: Served) -> None:
    (status,) = statuses(grouped, "Spare0")
    undisturbed = complete(grouped, PROMPTS[0])
    assert complete(grouped, PROMPTS[0], lambda n: kill(status["pid"]) if n == 5 else None) == undisturbed

    def replaced() -> bool:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            return [s["pid"] for s in statuses(grouped, "Spare0")] not in ([], [status["pid"]])
        except (RayError, RayServeException, TimeoutError):
            return False

    eventually(replaced, 60)


def test_a_group_is_scaled_as_one(grouped: Served) -> None:
    undisturbed, others = complete(grouped, PROMPTS[0]), [statuses(grouped, name)[0]["pid"] for name in GROUPS[2:]]
    said = by_hand(grouped, [3, 2], 2)
    assert said.splitlines()[:2] == ["Experts2-3 holds expert 2", "Experts2-3 holds expert 3"]
    assert said.count("2/2") == 1
    assert len(statuses(grouped, "Experts2-3")) == 2
    started = time.monotonic()
    while not all(s["calls"] for s in statuses(grouped, "Experts2-3")) and time.monotonic() < started + 30:
        assert complete(grouped, PROMPTS[0]) == undisturbed
    assert all(s["calls"] for s in statuses(grouped, "Experts2-3"))
    by_hand(grouped, [2], None)
    assert len(statuses(grouped, "Experts2-3")) == 1
    assert [statuses(grouped, name)[0]["pid"] for name in GROUPS[2:]] == others
    with pytest.raises(ConfigError, match="no expert 8: this model has 0 to 7"):
        by_hand(grouped, [8], 2)


def test_what_serve_is_told_of_each_deployment(random_model: Path) -> None:
    labels = {"pool": "in(a,b)"}
    config = load_config(
        {
            "model": {"path": str(random_model)},
            "trunk": {"labels": {"pool": "trunk"}, "num_gpus": 1},
            "experts": {
                **{"experts_per_actor": 3, "num_gpus": 1, "labels": labels},
                "overrides": {4: {"num_replicas": 2, "max_replicas_per_node": 1, "labels": {"zone": "!x"}}},
                "spares": [{"experts": {0: "all"}, "num_replicas": 2, "num_gpus": 0.5}],
            },
        }
    )
    deployments = {app.name: app for app in _deployments(build_app(config))}
    assert set(deployments) == {"Gateway", "Trunk", "Experts0-2", "Experts3-5", "Experts6-7", "Spare0"}
    assert deployments["Trunk"].ray_actor_options["label_selector"] == {"pool": "trunk"}
    assert "label_selector" not in deployments["Gateway"].ray_actor_options
    plain, hot, spare = (deployments[name] for name in ("Experts0-2", "Experts3-5", "Spare0"))
    assert (plain.ray_actor_options["num_gpus"], plain.ray_actor_options["label_selector"]) == (1, labels)
    assert [d._replica_config.max_replicas_per_node for d in (plain, hot, spare)] == [None, 1, None]
    assert hot.ray_actor_options["label_selector"] == {"zone": "!x"}
    scaling = hot._deployment_config.autoscaling_config
    assert (scaling.initial_replicas, scaling.policy.policy_kwargs["expert"]) == (2, 3)
    assert spare._deployment_config.autoscaling_config is None
    assert (spare.num_replicas, spare.ray_actor_options["num_gpus"]) == (2, 0.5)
    assert spare.ray_actor_options["label_selector"] == labels


def _deployments(app: Any) -> list[Any]:
    """The deployments of an application, whose arguments are other applications."""
    bound = app._bound_deployment
    inner = [each for argument in bound.init_args for each in (argument if isinstance(argument, list) else [argument])]
    found = [bound, *(d for each in inner if type(each) is type(app) for d in _deployments(each))]
    return list({deployment.name: deployment for deployment in found}.values())


def test_a_spare_of_what_the_model_lacks_is_refused(random_model: Path) -> None:
    experts = {"spares": [{"experts": {1: "3-4"}}]}
    config = load_config({"model": {"path": str(random_model)}, "experts": experts})
    with pytest.raises(ConfigError, match=r"`experts\.spares\.0\.experts\.1`: no layer 4: this model has 0 to 3"):
        build_app(config)


def placed_in_a_cluster(case: str, model: Path) -> tuple[str, list[dict[str, list[str]]]]:
    """What a case of `cluster_placement` printed, and for each node: GPU -> the actors on it."""
    program = Path(__file__).with_name("cluster_placement.py")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, program, case],
        capture_output=True,
        text=True,
        timeout=180,
        env={**inherited, "MODEL": str(model)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    nodes = []
    for line in done.stdout.splitlines():
        if line.startswith("node "):
            nodes.append({})
            for name, gpu in re.findall(r"((?:Trunk|Expert\d)) \(GPU (\d)\)", line):
                nodes[-1].setdefault(gpu, []).append(name)
    everyone = sorted(name for node in nodes for names in node.values() for name in names)
    assert everyone == [*(f"Expert{e}" for e in range(8)), "Trunk"], done.stdout
    return done.stdout, nodes


@pytest.mark.slow
def test_cards_that_a_cluster_reports_are_used(random_model: Path) -> None:
    """Three cards on two of three nodes, and nothing said by hand: three actors on each card, wherever Ray begins."""
    said, nodes = placed_in_a_cluster("planned-shared", random_model)
    assert "3 cards (3 x T4, 16 GiB)" in said
    assert "up to 3 actors share a card" in said
    assert [sum(map(len, node.values())) for node in nodes] == [3, 6, 0]


@pytest.mark.slow
def test_a_trunk_finds_a_card_of_its_own_beside_cards_that_are_shared(random_model: Path) -> None:
    """Three cards on one node, one on another: Ray fills two of the three, whoever is first, and leaves the third."""
    said, nodes = placed_in_a_cluster("planned-own-card", random_model)
    assert "Trunk is held to node" in said
    (trunks_node,) = [node for node in nodes if ["Trunk"] in node.values()]
    assert sorted(map(len, trunks_node.values())) in ([1, 2, 3], [1, 3, 3])
    assert all(len(names) <= 3 for node in nodes for names in node.values())


@pytest.mark.slow
def test_ray_fills_cards_one_by_one_so_that_whole_ones_remain() -> None:
    program = Path(__file__).with_name("card_shares.py")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=280, env=inherited, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all found room"
