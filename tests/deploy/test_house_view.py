"""What the page is shown of trunks and experts, from what Serve and the replicas say."""

from __future__ import annotations

from typing import Any

from moe_ray.deploy.house_view import ModelFacts, deployed, house_view
from moe_ray.deploy.load_overview import overview

FACTS = ModelFacts("mixture", layers=2, experts=2, top_k=1)


def full(name: str) -> str:
    """The id of a replica, as Serve writes it."""
    return f"SERVE_REPLICA::app#{name}"


def answer(replica_id: str, experts: tuple[int, ...], rows: int, loaded: int = 2, pid: int = 7) -> dict[str, Any]:
    """What a replica answers to `load`."""
    load = {
        "seconds": 10.0,
        "busy": 0.5,
        "rows_per_call": 4.0,
        "queue_ms": 0.25,
        "rows_per_layer": dict.fromkeys(experts, (rows, 2 * rows)),
    }
    place = {"replica_id": full(replica_id), "node_id": "node-with-a-long-id", "pid": pid}
    held = {"weight_bytes": 1000, "queued_rows": 3, "device": "cpu", "format": "int8", "loaded_keys": loaded, "keys": 2}
    return {**place, **held, "load": load}


def trunk(replica_id: str) -> dict[str, Any]:
    counts = {"num_running": 1, "num_waiting": 2, "kv_blocks_total": 100, "kv_blocks_free": 75, "generated_tokens": 9}
    limits = {
        "kv_cache_tokens": 1600,
        "max_model_len": 512,
        "missing": ["Expert1"],
        "device": "cpu",
        "format": "bfloat16",
    }
    return {
        "replica_id": full(replica_id),
        "model": "mixture",
        "node_id": "node-with-a-long-id",
        "pid": 5,
        **counts,
        **limits,
    }


def details(**states: list[tuple[str, str]]) -> dict[str, Any]:
    found = {
        name: {"target_num_replicas": 2, "replicas": [{"replica_id": each, "state": state} for each, state in replicas]}
        for name, replicas in states.items()
    }
    return {"applications": {"app": {"deployments": found}}}


def test_replicas_and_their_states() -> None:
    known = deployed(
        "app",
        details(
            Trunk=[("t", "RUNNING"), ("u", "STARTING")],
            Expert0=[("a", "RUNNING"), ("b", "STARTING"), ("c", "RUNNING"), ("d", "STOPPING")],
            Expert1=[("e", "RUNNING")],
        ),
    )
    answers = {
        "Expert0": [
            answer("Expert0#a", (0,), 10),
            answer("Expert0#d", (0,), 2, loaded=1),
        ],
        "Expert1": [],
    }
    view = house_view(FACTS, known, {"Trunk": [trunk("Trunk#t")]}, answers, ["Expert1"])
    assert view["missing"] == ["Expert1"]
    assert (view["layers"], view["num_experts"], view["top_k"]) == (2, 2, 1)
    first, second = view["trunks"]
    assert (first["state"], first["kv_use"], first["running"], first["missing"]) == ("running", 0.25, 1, ["Expert1"])
    assert second == {"replica_id": full("Trunk#u"), "state": "starting"}
    busy, gone = view["experts"]
    states = {replica["replica_id"][-1]: replica["state"] for replica in busy["replicas"]}
    assert states == {"a": "running", "b": "starting", "c": "away", "d": "stopping"}
    assert (busy["wanted"], busy["rows_per_layer"]) == (2, [12, 24])
    assert busy["replicas"][0]["format"] == "int8"
    assert [replica["state"] for replica in gone["replicas"]] == ["away"]
    assert gone["rows_per_s"] == 0


def test_a_replica_that_loads_says_how_far() -> None:
    view = house_view(
        FACTS,
        deployed("app", details(Expert0=[("a", "RUNNING")])),
        {},
        {"Expert0": [answer("Expert0#a", (0,), 1, loaded=1)]},
        [],
    )
    (replica,) = view["experts"][0]["replicas"]
    assert (replica["state"], replica["loaded"]) == ("loading", 0.5)


def test_groups_and_spares_are_listed_under_each_of_their_experts() -> None:
    known = deployed(
        "app",
        {
            "applications": {
                "app": details(**{"Experts0-1": [("a", "RUNNING")], "Spare0": [("s", "RUNNING")]})["applications"][
                    "app"
                ]
            }
        },
    )
    answers = {
        "Experts0-1": [answer("Experts0-1#a", (0, 1), 10)],
        "Spare0": [answer("Spare0#s", (1,), 5)],
    }
    view = house_view(FACTS, known, {}, answers, [])
    assert [len(expert["replicas"]) for expert in view["experts"]] == [1, 2]
    assert [expert["deployment"] for expert in view["experts"]] == ["Experts0-1"] * 2
    assert view["max_over_mean"] == overview(answers)["max_over_mean"]


def test_an_application_that_is_not_there_has_no_deployments() -> None:
    assert deployed("other", details(Trunk=[])) == {}
    assert deployed("app", {}) == {}
