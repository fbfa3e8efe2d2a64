"""Alerts and dashboards: valid PromQL on metrics that exist, alerts that fire when they should, a runbook for each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from cluster_files import CLUSTER, ROOT, module, shell

from moe_ray.core import EngineStats
from moe_ray.deploy.metrics import ENGINE_GAUGES
from moe_ray.deploy.vllm_metrics import ENDED_HISTOGRAMS, ENGINE_COUNTERS_OF_VLLM, ENGINE_GAUGES_OF_VLLM, OTHERS
from moe_ray.experts.client.accounting import Counters

RULES = CLUSTER / "prometheus" / "rules.yaml"
DASHBOARDS = sorted((CLUSTER / "grafana").glob("*.json"))


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return group["rules"]  # type: ignore[no-any-return]


def panels(dashboard: Path) -> list[dict[str, Any]]:
    return json.loads(dashboard.read_text())["panels"]  # type: ignore[no-any-return]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of all alerts and panels, Grafana's variables filled in."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for dashboard in DASHBOARDS:
        for panel in panels(dashboard):
            for target in panel.get("targets", []):
                text = target["expr"].replace("$__rate_interval", "1m")
                yield f"{dashboard.stem}: {panel['title']}", re.sub(r"\$\w+", ".*", text)


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector below a node of the parser."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    for name in ("expr", "lhs", "rhs"):
        if (below := getattr(node, name, None)) is not None:
            yield from selectors(below)
    for below in getattr(node, "args", ()):
        yield from selectors(below)


@cache
def exported() -> frozenset[str]:
    """Every name that moe_ray and this version of Ray export, as their sources spell them."""
    import ray

    ours = (ROOT / "moe_ray" / "deploy" / "metrics.py").read_text()
    names = set(re.findall(r'"(moe_ray_\w+)"', ours))
    names |= {f"moe_ray_pool_{field.name}_total" for field in fields(Counters)}
    names |= {f"moe_ray_trunk_{f.name}_total" for f in fields(EngineStats) if f.name not in ENGINE_GAUGES}
    names |= {f"moe_ray_trunk_{name}" for name, _ in ENGINE_GAUGES.values()}
    for name, _, _ in ENDED_HISTOGRAMS.values():
        names |= {f"{name}_bucket", f"{name}_count", f"{name}_sum"}
    names |= {name for name, _ in (*ENGINE_GAUGES_OF_VLLM.values(), *ENGINE_COUNTERS_OF_VLLM.values())} | {*OTHERS}
    package = Path(ray.__file__).parent
    for source in (package / "serve" / "_private").glob("*.py"):
        for name in re.findall(r'f?"(serve_[\w{}]+)"', source.read_text()):
            name = name.replace("{protocol_name}", "http")
            # Counters get `_total`, histograms their usual three.
            names |= {name, f"{name}_total", f"{name}_bucket", f"{name}_count", f"{name}_sum"}
    names |= set(re.findall(r'"(node_\w+)"', (package / "dashboard/modules/reporter/reporter_agent.py").read_text()))
    return frozenset(f"ray_{name}" for name in names)


@pytest.mark.parametrize(("where", "text"), list(expressions()), ids=lambda value: str(value)[:40])
def test_every_expression_is_promql_on_metrics_that_exist(where: str, text: str) -> None:
    found = list(selectors(promql_parser.parse(text)))
    assert found
    for selector in found:
        assert selector.name in exported(), f"{where}: nobody exports {selector.name}"


def test_a_metric_that_does_not_exist_would_be_found() -> None:
    assert "ray_moe_ray_expert_busy_fraction" in exported()
    assert "ray_serve_num_http_requests_total" in exported()
    assert "ray_moe_ray_expert_rows" not in exported()


def test_every_selector_of_a_rule_has_braces() -> None:
    """So that the chart can put a namespace into each."""
    for rule in rules():
        named = re.findall(r"\bray_\w+", rule["expr"])
        assert len(named) == len(re.findall(r"\bray_\w+\{", rule["expr"])), rule["alert"]
        narrowed = re.sub(r"\b(ray_\w+)\{", r'\1{namespace="x",', rule["expr"])
        for selector in selectors(promql_parser.parse(narrowed)):
            assert any(matcher.name == "namespace" for matcher in selector.matchers.matchers)


def test_every_alert_says_what_it_means_and_where_to_read_on() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^## (.*)$", (CLUSTER / "runbooks" / "alerts.md").read_text(), re.M)
    }
    linked = set()
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        file, anchor = rule["annotations"]["runbook_url"].split("#")
        assert (ROOT / file) == CLUSTER / "runbooks" / "alerts.md"
        assert anchor == rule["alert"].lower()
        linked.add(anchor)
    assert linked == anchors, "one section an alert, and no other"


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    tests = yaml.safe_load((CLUSTER / "prometheus" / "rules_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


def test_promtool_agrees(promtool: Path) -> None:
    checked = shell(promtool, "check", "rules", RULES)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = shell(promtool, "test", "rules", RULES.with_name("rules_test.yaml"))
    assert tested.returncode == 0, tested.stdout + tested.stderr
    config = shell(promtool, "check", "config", "--syntax-only", CLUSTER / "compose" / "prometheus.yaml")
    assert config.returncode == 0, config.stdout + config.stderr


def test_dashboards_are_what_their_source_builds() -> None:
    built = module(CLUSTER / "grafana" / "build.py").texts()
    assert {path.name for path in DASHBOARDS} == built.keys()
    for path in DASHBOARDS:
        assert path.read_text() == built[path.name], "run python cluster/grafana/build.py"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_their_own_place_and_the_chosen_data_source(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == path.stem
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    covered: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & covered, f"{panel['title']} lies on another"
        assert all(x < 24 for x, _ in cells)
        covered |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            used = {name for t in panel["targets"] for name in re.findall(r"\$(\w+)", t["expr"])}
            assert used - {"__rate_interval"} <= variables
            assert "namespace" in used
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_metric_of_moe_ray_is_on_a_dashboard() -> None:
    shown = " ".join(text for where, text in expressions() if ":" in where)
    ours = {name for name in exported() if name.startswith("ray_moe_ray_")}
    # Free blocks are those that are not held.
    assert {name for name in ours if not re.search(rf"\b{name}\b", shown)} == {"ray_moe_ray_trunk_kv_blocks_free"}


def test_the_chart_ships_the_same_alerts_and_dashboards() -> None:
    """What helm/moe-ray/files has of them is a copy, byte for byte."""
    files = ROOT / "helm" / "moe-ray" / "files"
    pairs = [(CLUSTER / "prometheus" / "rules.yaml", files / "rules.yaml")]
    pairs += [(path, files / "dashboards" / path.name) for path in DASHBOARDS]
    there = [(source, copy) for source, copy in pairs if copy.exists()]
    if not there:
        pytest.skip("the chart has no copies")
    for source, copy in there:
        assert copy.read_bytes() == source.read_bytes(), f"cp {source.relative_to(ROOT)} {copy.relative_to(ROOT)}"
