"""`moe-ray doctor` about Ray: addresses that lead nowhere, clusters that cannot be joined, servers that are unwell."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import Served

from moe_ray.bench.free_port import free_port
from moe_ray.config import load_config
from moe_ray.deploy.cluster_state import ClusterState, cluster_state
from moe_ray.deploy.local_ray import reason
from moe_ray.deploy.ray_internals import CURRENT_CLUSTER
from moe_ray.doctor import ray_state
from moe_ray.doctor.finding import Finding, Subject
from moe_ray.doctor.ray_state import RayFacts

HERE = ClusterState(
    "127.0.0.1:6379",
    nodes=({"Alive": True}, {"Alive": True}),
    dashboard="127.0.0.1:8265",
    applications={"moe-ray": "RUNNING"},
    url="http://127.0.0.1:8000",
)
FACTS = RayFacts("2.60.0", "auto", None, None, None, None, None, (HERE,), {})


def only(found: Sequence[Finding], check: str) -> Finding:
    (finding,) = (each for each in found if each.check == check)
    assert bool(finding.mend) == (finding.level != "ok")
    return finding


def subject(**environ: str) -> Subject:
    return Subject(load_config(), None, environ, 8000, "auto", False, lambda config, directory: 0)


def nobodys_address() -> str:
    return f"127.0.0.1:{free_port()}"


def test_addresses_of_clusters_that_are_gone() -> None:
    gone, noted = nobodys_address(), nobodys_address()
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # short enough for sockets
        file = Path(directory) / CURRENT_CLUSTER
        file.parent.mkdir()
        file.write_text(noted)
        variable, left = ray_state.check_addresses(ray_state.ray_facts(subject(RAY_ADDRESS=gone, RAY_TMPDIR=directory)))
    assert variable.level == "error"
    assert f"no Ray cluster at {gone}: nothing listens there" in variable.says
    assert variable.says.endswith("($RAY_ADDRESS)")
    assert variable.mend == "unset RAY_ADDRESS"
    assert left.level == "warning"
    assert f"{file} names {noted}" in left.says
    asked = replace(subject(), address=gone)
    finding = only(ray_state.check_addresses(ray_state.ray_facts(asked)), "ray address")
    assert finding.mend == "give --address of a cluster that runs"


@pytest.mark.parametrize(
    ("changes", "check", "level", "says"),
    [
        ({}, "ray clusters", "ok", "127.0.0.1:6379 (2 nodes)"),
        ({}, "servers", "ok", "moe-ray at http://127.0.0.1:8000: RUNNING"),
        ({"clusters": ()}, "servers", "ok", "none runs"),
        ({"clusters": (ClusterState("x:1", fault="Version mismatch"),)}, "ray clusters", "error", "this is Ray 2.60.0"),
        (
            {"clusters": (replace(HERE, nodes=({"Alive": True}, {"Alive": False})),)},
            "ray clusters",
            "warning",
            "1 of 2",
        ),
        ({"dashboard_faults": {"127.0.0.1:8265": "refused"}}, "ray clusters", "warning", "does not answer (refused)"),
        (
            {"clusters": (HERE, replace(HERE, address="127.0.0.1:7000"))},
            "servers",
            "warning",
            "--address 127.0.0.1:7000",
        ),
        ({"clusters": (replace(HERE, applications={"moe-ray": "UNHEALTHY"}),)}, "servers", "error", "is UNHEALTHY"),
    ],
)
def test_clusters_and_servers(changes: dict[str, Any], check: str, level: str, says: str) -> None:
    facts = replace(FACTS, **changes)
    finding = only([*ray_state.check_clusters(facts), *ray_state.check_servers(facts)], check)
    assert finding.level == level
    assert says in finding.says


def test_another_version_is_told_in_one_line() -> None:
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": "2.9.0", "python_version": "3.9.1"}, "this node")
    said = reason(raised.value)
    assert "\n" not in said
    assert "Ray: 2.9.0" in said
    assert "Python: 3.9.1" in said


def test_a_cluster_that_serves(served_random: Served) -> None:
    state = cluster_state("auto")
    assert state.fault is None
    assert (state.applications or {})[served_random.app_name] == "RUNNING"
    assert state.dead_nodes == 0
    assert (state.resources or {})["CPU"] == 8
    assert served_random.url.startswith(state.url)
    facts = replace(FACTS, clusters=(state,))
    assert only(ray_state.check_clusters(facts), "ray clusters").level == "ok"
    assert served_random.app_name in only(ray_state.check_servers(facts), "servers").says
