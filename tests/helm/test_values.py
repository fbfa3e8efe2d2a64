"""What values do, that they are documented, and that wrong ones are named."""

from __future__ import annotations

import json
from typing import Any

import helm_python as helm
import pytest
import ray
import yaml
from helm_rendering import CHART, NAMESPACE, Manifest, Rendered, render
from values_table import TABLE, documented, table


def test_network_policy_opens_the_api_only() -> None:
    closed = render()
    (policy,) = closed.of("NetworkPolicy")
    among_us, operator, api = policy["spec"]["ingress"]
    assert "ports" not in among_us
    assert among_us["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
    assert operator["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
    assert {port["port"] for port in operator["ports"]} == {8265, 52365, 8000}
    assert api == {"ports": [{"port": 8000}]}
    monitoring = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    (policy,) = render({"networkPolicy": {"metricsFrom": monitoring}}).of("NetworkPolicy")
    metrics = policy["spec"]["ingress"][-1]
    assert metrics["from"] == monitoring
    assert {port["port"] for port in metrics["ports"]} == {8080, 44217, 44227}


@pytest.mark.parametrize("kind", ["podMonitor", "serviceMonitor"])
def test_a_monitor_finds_open_ports(kind: str) -> None:
    """Nothing scraped looks like nobody serving to the alerts."""
    monitoring = {kind: {"enabled": True}}
    (policy,) = render({"monitoring": monitoring}).of("NetworkPolicy")
    metrics = policy["spec"]["ingress"][-1]
    assert metrics["from"] == [{"namespaceSelector": {}}]
    assert 8080 in {port["port"] for port in metrics["ports"]}
    mine = [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]
    (policy,) = render({"monitoring": monitoring, "networkPolicy": {"metricsFrom": mine}}).of("NetworkPolicy")
    assert policy["spec"]["ingress"][-1]["from"] == mine


def test_the_gateways_own_metrics_are_scraped_once() -> None:
    monitoring = {"podMonitor": {"enabled": True, "gateway": True, "interval": "20s"}}
    rendered = render({"monitoring": monitoring, "networkPolicy": {"clientsFrom": [{"namespaceSelector": {}}]}})
    *_, endpoint = rendered.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    (only,) = endpoint.pop("relabelings")
    assert endpoint == {"port": "serve", "interval": "20s"}
    assert (only["sourceLabels"], only["regex"], only["action"]) == (
        ["__meta_kubernetes_pod_label_ray_io_node_type"],  # which KubeRay sets: head or worker
        "head",
        "keep",
    )
    assert "serve" in {p["name"] for p in rendered.groups["headgroup"]["template"]["spec"]["containers"][0]["ports"]}
    (policy,) = rendered.of("NetworkPolicy")
    assert 8000 in {port["port"] for port in policy["spec"]["ingress"][-1]["ports"]}
    assert "serve" not in str(render({"monitoring": {"podMonitor": {"enabled": True}}}).one("PodMonitor"))
    with pytest.raises(helm.HelmError, match=r"monitoring\.podMonitor\.gateway.*gateway\.numReplicas is 2"):
        render({"monitoring": monitoring, "gateway": {"numReplicas": 2}})


def test_disruption_budgets() -> None:
    groups = {"trunk": {"minReplicas": 1}, "experts": {"replicas": 8, "minReplicas": 8, "maxReplicas": 8}}
    budgets = render({"workerGroups": groups, "podDisruptionBudget": {"head": True}}).of("PodDisruptionBudget")
    assert {b["metadata"]["name"]: b["spec"]["minAvailable"] for b in budgets} == {
        "r-moe-ray-experts": 7,  # the trunk's one pod may go: with a budget of one its node could not be drained
        "r-moe-ray-head": 1,
    }
    assert {b["spec"]["unhealthyPodEvictionPolicy"] for b in budgets} == {"AlwaysAllow"}


def test_names_suit_kuberay() -> None:
    download = {"volume": {"enabled": True}, "download": {"enabled": True, "repo": "owner/mixtral"}}
    long = render({"model": download}, release="a-name-of-fifty-three-characters-as-helm-allows-it-xx")
    assert len(long.one("RayService")["metadata"]["name"]) <= 47
    assert len(long.one("Job")["metadata"]["name"]) <= 63  # it becomes a label of the Job's pod
    with pytest.raises(helm.HelmError, match="set fullnameOverride"):
        render(release="8x7b")
    assert render({"fullnameOverride": "mixtral"}, release="8x7b").one("RayService")["metadata"]["name"] == "mixtral"


def test_the_model_from_a_volume() -> None:
    volume = {"enabled": True, "existingClaim": "models"}
    rendered = render({"model": {"path": "/models/mixtral", "volume": volume}})
    assert rendered.of("PersistentVolumeClaim") == []
    assert rendered.of("Job") == []
    for group in rendered.groups.values():
        _, wait = group["template"]["spec"]["initContainers"]
        assert {e["name"]: e["value"] for e in wait["env"]}["MODEL"] == "/models/mixtral"
        mounts = {m["name"]: m for m in group["template"]["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["model"] == {"name": "model", "mountPath": "/models", "readOnly": True}
    assert rendered.application["args"]["model"]["path"] == "/models/mixtral"


def test_gpus() -> None:
    values = {"workerGroups": {"experts": {"gpu": {"count": 2, "type": "T4", "typeLabel": "card"}}}}
    groups = render(values).groups
    spec = groups["experts"]["template"]["spec"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert spec["nodeSelector"] == {"card": "T4"}
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert "nvidia.com/gpu" not in groups["trunk"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    everywhere = render({"pod": {"gpu": {"count": 1}}}).groups
    assert "nvidia.com/gpu" not in everywhere["headgroup"]["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_versions_are_those_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((CHART.parents[1] / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert chart["appVersion"] == project["version"]
    assert values["rayVersion"] == ray.__version__
    assert f"ray[serve]=={values['rayVersion']}" in project["dependencies"]


def test_readme_lists_the_values() -> None:
    """`python tests/helm/values_table.py` writes the table anew."""
    before, _, rest = (CHART / "README.md").read_text().partition(TABLE[0])
    assert before
    assert rest.partition(TABLE[1])[0].strip() == table().strip()


def test_every_value_is_documented_and_has_a_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert [path for path, (text, _) in documented().items() if not text] == []
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(value: Any, part: Manifest, path: str) -> None:
        if "properties" not in part:
            return
        assert part["additionalProperties"] is False, path
        known = set(part["properties"]) - {"global"}
        if path != "":
            assert set(value) <= known, path
        else:
            assert set(value) == known
        for key, inner in value.items():
            if isinstance(inner, dict):
                compare(inner, part["properties"][key], f"{path}.{key}")

    compare(values, schema, "")


def rules(rendered: Rendered) -> dict[str, str]:
    """The chart's own alerts → their expressions."""
    group = rendered.one("PrometheusRule")["spec"]["groups"][0]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def test_an_alert_can_be_left_out(everything: Rendered) -> None:
    every = rules(render({"monitoring": {"prometheusRule": {"enabled": True}}}))
    assert set(every) - set(rules(everything)) == {"MoeRayPreemptions"}


def test_alerts_are_those_of_the_repository_for_this_namespace(everything: Rendered) -> None:
    """That their metrics exist, and that the chart's files are the repository's, `tests/cluster` checks."""
    source = yaml.safe_load((CHART.parents[1] / "cluster" / "prometheus" / "rules.yaml").read_text())
    every = {rule["alert"]: rule for rule in source["groups"][0]["rules"]}
    alerts = rules(everything)
    assert set(alerts) == set(every) - {"MoeRayPreemptions"}
    for alert, expression in alerts.items():
        narrowed = f'{{namespace="{NAMESPACE}"'
        assert expression.count("{") == expression.count(narrowed) > 0
        assert expression.replace(f"{narrowed}, ", "{").replace(narrowed, "{") == every[alert]["expr"]


def test_dashboards_are_shipped(everything: Rendered) -> None:
    shipped = everything.one("ConfigMap", "-dashboards")
    assert shipped["metadata"]["labels"]["grafana_dashboard"] == "1"
    titles = {json.loads(text)["uid"] for text in shipped["data"].values()}
    assert titles == {path.stem for path in (CHART.parents[1] / "cluster" / "grafana").glob("*.json")}


def test_notes_tell_how_to_go_on(everything: Rendered) -> None:
    for rendered in (everything, render()):
        for words in ("port-forward", "/v1/chat/completions", "helm test", "experts.overrides.3.", "serve status"):
            assert words in rendered.notes
        assert "WARNING" not in rendered.notes
    open_to_all = {
        "auth": {name: {"enabled": False} for name in ("apiKeys", "clusterToken", "rayToken")},
        "networkPolicy": {"enabled": False},
        "model": {"path": "owner/mixtral"},
    }
    assert render(open_to_all).notes.count("WARNING") == 4
