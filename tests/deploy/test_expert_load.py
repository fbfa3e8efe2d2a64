"""`GET /experts`, `moe-ray status` and what Prometheus sees: the rows that were sent, and nothing else."""

from __future__ import annotations

import asyncio
import collections
import io
import json
import re
import time
from typing import Any

import httpx
import pytest
from rich.console import Console
from served import Served

from moe_ray.deploy import discovery
from moe_ray.deploy.discovery import ask_each
from moe_ray.deploy.load_overview import busiest, by_replica, overview
from moe_ray.experts.planning.balance import parse_load
from moe_ray.experts.planning.placement import experts_in

LAYERS, TOP_K = 4, 2
SERIES = re.compile(r"ray_moe_ray_expert_(\w+)\{(.*)\} (\S+)")
TAG = re.compile(r'(\w+)="([^"]*)"')


def answer(name: str, rows_per_layer: dict[int, tuple[int, ...]], busy: float = 0.5) -> dict[str, Any]:
    rows = sum(map(sum, rows_per_layer.values()))
    load = {
        **{"seconds": 10.0, "busy": busy, "rows_per_s": rows / 10, "calls_per_s": 1.0},
        **{"rows_per_call": 3.0, "queue_ms": 0.25, "rows_per_layer": rows_per_layer},
    }
    place = {"replica_id": name, "node_id": "n", "pid": 7, "weight_bytes": 100}
    return {**place, "queued_rows": 2, "rows": 10**6, "load": load}


def test_an_overview_adds_up_replicas_and_compares_experts() -> None:
    both = [answer("b", {1: (10, 0)}, 0.2), answer("a", {1: (20, 30)}, 0.6)]
    got = overview({"Expert1": both, "Expert0": [answer("c", {0: (0, 20)})], "Expert2": []})
    assert [expert["expert"] for expert in got["experts"]] == [0, 1, 2]
    zero, one, two = got["experts"]
    assert [replica["replica_id"] for replica in one["replicas"]] == ["a", "b"]
    assert (one["rows_per_layer"], one["rows_per_s"], one["busy"]) == ([30, 30], 6.0, pytest.approx(0.4))
    assert two == {"expert": 2, "replicas": [], "rows_per_layer": [], "rows_per_s": 0, "busy": 0}
    assert got["max_over_mean"] == 60 / 40, "the mean is over experts that answer"
    assert busiest(got["experts"]) == 1
    place = {"deployment": "Expert0", "replica_id": "c", "node_id": "n", "pid": 7}
    rates = {"rows_per_layer": [0, 20], "rows_per_s": 2.0, "busy": 0.5, "rows_per_call": 3.0, "queue_ms": 0.25}
    assert zero["replicas"] == [{**place, **rates, "queued_rows": 2, "weight_bytes": 100}]


def test_groups_and_spares_are_told_apart_by_expert() -> None:
    got = overview(
        {
            "Spare0": [answer("s", {1: (0, 5), 2: (7, 0)})],
            "Experts2-3": [answer("y", {2: (1, 2), 3: (3, 4)})],
            "Experts0-1": [answer("x", {0: (10, 20), 1: (30, 40)}), answer("w", {0: (1, 1), 1: (1, 1)})],
            "Expert4": [],
        }
    )
    rows = {expert["expert"]: expert["rows_per_layer"] for expert in got["experts"]}
    assert rows == {0: [11, 21], 1: [31, 46], 2: [8, 2], 3: [3, 4], 4: []}
    names = {expert["expert"]: [r["replica_id"] for r in expert["replicas"]] for expert in got["experts"]}
    assert names == {0: ["w", "x"], 1: ["w", "x", "s"], 2: ["y", "s"], 3: ["y"], 4: []}
    assert [expert["rows_per_s"] for expert in got["experts"]] == [3.2, 7.7, 1.0, 0.7, 0]
    assert got["max_over_mean"] == 77 * 4 / (32 + 77 + 10 + 7)
    assert busiest(got["experts"]) == 1
    assert parse_load(json.dumps({"experts": got["experts"][:4]}), "f") == [[11, 31, 8, 3], [21, 46, 2, 4]]
    whole = [(r["deployment"], r["replica_id"], r["rows_per_s"]) for r in by_replica(got["experts"])]
    assert whole == [
        ("Experts0-1", "w", pytest.approx(0.4)),
        ("Experts0-1", "x", 10.0),
        ("Experts2-3", "y", 1.0),
        ("Spare0", "s", 1.2),
    ]


def test_an_overview_of_nothing() -> None:
    assert overview({}) == {"experts": [], "window_s": 10.0, "max_over_mean": None}
    assert overview({"Expert0": [answer("a", {0: (0, 0)})]})["max_over_mean"] is None


def experts(served: Served) -> dict[str, Any]:
    response = httpx.get(f"{served.url}/experts", timeout=30, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


def complete(served: Served, prompt: list[int], max_tokens: int) -> None:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    assert httpx.post(f"{served.url}/v1/completions", json=body, timeout=120, trust_env=False).status_code == 200


def hedges(served: Served) -> int:
    """Calls that the trunk has sent a second time, because they were late, to the other replica of expert 3."""
    from ray import serve

    (status,) = serve.get_deployment_handle("Trunk", served.app_name).broadcast("status").results(timeout_s=10)
    return status["expert_calls"]["hedges"]


@pytest.fixture(scope="module")
def worked(served_random: Served) -> dict[str, Any]:
    """`GET /experts` once a window has seen one completion and nothing else; and how many calls were `hedged`."""
    deadline = time.monotonic() + 20
    while any(sum(expert["rows_per_layer"]) for expert in experts(served_random)["experts"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    before = hedges(served_random)
    complete(served_random, list(range(460, 500)), 25)  # a prompt that no other test puts into the prefix cache
    return {**experts(served_random), "hedged": hedges(served_random) - before}


def test_the_experts_route_counts_the_rows_that_were_sent(worked: dict[str, Any]) -> None:
    assert [(expert["expert"], len(expert["replicas"])) for expert in worked["experts"]] == [
        (e, 2 if e == 3 else 1) for e in range(8)
    ]
    computed = 40 + 25 - 1  # the last token is not computed: nothing follows it
    sums = [sum(expert["rows_per_layer"][layer] for expert in worked["experts"]) for layer in range(LAYERS)]
    assert min(sums) >= TOP_K * computed
    assert sum(sums) - LAYERS * TOP_K * computed <= 40 * worked["hedged"], "what was sent twice, and no more"
    rows = [sum(expert["rows_per_layer"]) for expert in worked["experts"]]
    assert worked["max_over_mean"] == pytest.approx(8 * max(rows) / sum(rows))
    for expert in worked["experts"]:
        for replica in expert["replicas"]:
            assert 0 <= replica["busy"] <= 1
            assert replica["queue_ms"] >= 0
            assert replica["queued_rows"] == 0
            assert replica["weight_bytes"] > 0
            assert 1 <= replica["rows_per_call"] <= 40 or replica["rows_per_s"] == 0
    assert any(expert["busy"] > 0 for expert in worked["experts"])


def test_status_shows_the_same(served_random: Served) -> None:
    from moe_ray.deploy import status

    complete(served_random, list(range(100, 110)), 5)
    snapshot = status.collect(name=served_random.app_name)
    found = snapshot["load"]
    assert min(sum(expert["rows_per_layer"][layer] for expert in found["experts"]) for layer in range(LAYERS)) >= 28
    said = io.StringIO()
    status.print_status(Console(file=said, width=80, highlight=False), snapshot)
    table, load = said.getvalue().split("\n\n")
    assert all(len(line) <= 80 for line in said.getvalue().splitlines())
    assert table.count("Expert3") == 2
    heading, *rows, imbalance = load.splitlines()
    assert " ".join(heading.split()) == "last 10 s pid busy rows/s rows/call wait ms queued rows"
    replicas = [(expert["expert"], replica) for expert in found["experts"] for replica in expert["replicas"]]
    assert len(replicas) == 9
    for row, (expert, replica) in zip(rows, replicas, strict=True):
        assert row.split()[:3] == [f"Expert{expert}", str(replica["pid"]), f"{replica['busy']:.0%}"]
        assert row.split()[4:] == [f"{replica['rows_per_call']:,.1f}", f"{replica['queue_ms']:,.2f}", "0"]
    name = f"Expert{busiest(found['experts'])}"
    assert imbalance == f"imbalance: {name} computed {found['max_over_mean']:.2f} times the rows of the mean expert"


def test_an_expert_that_does_not_answer_has_no_replicas(served_random: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    monkeypatch.setattr(discovery, "BROADCAST_TIMEOUT_S", 1.0)
    nobody = serve.get_deployment_handle("Expert9", served_random.app_name, _check_exists=False)
    somebody = serve.get_deployment_handle("Expert3", served_random.app_name)
    answers = asyncio.run(ask_each([nobody, somebody], "load"))
    assert [len(found) for found in answers] == [0, 2]


def test_prometheus_sees_the_rows(served_random: Served, worked: dict[str, Any]) -> None:
    import ray
    from ray import serve

    handles = [serve.get_deployment_handle(f"Expert{e}", served_random.app_name) for e in range(8)]
    answers = [load for found in asyncio.run(ask_each(handles, "load")) for load in found]
    expected = {load["replica_id"]: load["rows"] for load in answers if load["rows"]}
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    while True:
        lines = httpx.get(url, timeout=10, trust_env=False).text.splitlines()
        found = [SERIES.fullmatch(line) for line in lines]
        series = [(m[1], dict(TAG.findall(m[2])), float(m[3])) for m in found if m is not None]
        rows: collections.Counter[str] = collections.Counter()
        for name, tags, value in series:
            if name == "rows_total" and tags["replica"] in expected:
                rows[tags["replica"]] += int(value)
        if rows == expected:
            break
        assert time.monotonic() < deadline, (rows, expected)
        time.sleep(0.5)
    assert {name for name, _, _ in series} == {
        *("rows_total", "busy_fraction", "queue_wait_ms", "rows_per_call", "queued_rows")
    }
    for name, tags, _ in series:
        assert f"#{tags['deployment']}#" in tags["replica"]
        assert ("layer" in tags) == ("expert" in tags) == (name == "rows_total")
        if "expert" in tags and (held := experts_in(tags["deployment"])):
            assert int(tags["expert"]) in held
