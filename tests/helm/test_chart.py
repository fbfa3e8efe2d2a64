"""Every profile of the chart: rendered by Helm, checked against the schemas of Kubernetes and KubeRay and itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from helm_rendering import CHART, NAMESPACE, PROFILES, RELEASE, Manifest, Rendered, profile, render

KUBERNETES = ("1.28", "1.33")


"""The oldest that Chart.yaml allows, and a recent one."""


OURS = {"ray.io/v1"}


FOREIGN: dict[tuple[str, str], list[str]] = {
    ("monitoring.coreos.com/v1", "PodMonitor"): ["selector.matchLabels", "podMetricsEndpoints.0.port"],
    ("monitoring.coreos.com/v1", "ServiceMonitor"): ["selector.matchLabels", "endpoints.0.port"],
    ("monitoring.coreos.com/v1", "PrometheusRule"): ["groups.0.name", "groups.0.rules.0.expr"],
    ("cert-manager.io/v1", "Certificate"): ["secretName", "issuerRef.name", "dnsNames.0", "usages.0"],
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): ["parentRefs.0.name", "rules.0.backendRefs.0.name"],
}


"""Kinds whose schemas cannot be had offline → fields that they cannot do without. Nothing else of them is checked."""


def pod_specs(rendered: Rendered) -> Iterator[Manifest]:
    for group in rendered.groups.values():
        yield group["template"]["spec"]
    yield from (job["spec"]["template"]["spec"] for job in rendered.of("Job"))
    yield from (pod["spec"] for pod in rendered.of("Pod"))


def containers(rendered: Rendered) -> Iterator[Manifest]:
    for spec in pod_specs(rendered):
        yield from (*spec.get("initContainers", []), *spec["containers"])


def labels(group: Manifest) -> dict[str, str]:
    found: dict[str, str] = group["template"]["metadata"]["labels"]
    return found


def dig(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    return value


@pytest.mark.parametrize("path", [*PROFILES, None], ids=lambda path: path.stem if path else "defaults")
def test_lints(path: Path | None) -> None:
    report = helm.lint(CHART, yaml.safe_load(path.read_text()) if path else {}, strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


def test_built_in_kinds_are_valid(rendered: Rendered) -> None:
    checked = 0
    for manifest in rendered.manifests:
        if (manifest["apiVersion"], manifest["kind"]) in FOREIGN or manifest["apiVersion"] in OURS:
            continue
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)
            checked += 1
    assert checked >= 6 * len(KUBERNETES)


def test_pod_templates_are_valid(rendered: Rendered) -> None:
    for name, group in rendered.groups.items():
        template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": name},
            "template": group["template"],
        }
        for version in KUBERNETES:
            kubernetes_validate.validate(template, version, strict=True)


def test_ray_service_is_valid(rendered: Rendered, crds: dict[tuple[str, str], Any]) -> None:
    manifest = copy.deepcopy(rendered.one("RayService"))
    errors = crd_errors(manifest, crds)
    assert errors == []
    manifest["spec"]["rayClusterConfig"]["enableInTreeAutoscalling"] = True
    assert crd_errors(manifest, crds), "a typo would not be noticed"


def crd_errors(manifest: Manifest, crds: dict[tuple[str, str], Any]) -> list[str]:
    import crd_validate

    validator = crds[manifest["apiVersion"], manifest["kind"]]
    filled = copy.deepcopy(manifest)
    crd_validate.defaults(validator.schema, filled)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in validator.iter_errors(filled)]


@pytest.mark.parametrize("mode", ["off", "redis", "rocksdb"])
@pytest.mark.parametrize("upgrade", ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"])
def test_ray_service_variants_are_valid(mode: str, upgrade: str, crds: dict[tuple[str, str], Any]) -> None:
    rendered = render(
        {
            "gcsFaultTolerance": {"mode": mode, "redis": {"address": "redis://redis:6379"}},
            "upgradeStrategy": {"type": upgrade, "clusterUpgradeOptions": {"gatewayClassName": "istio"}},
        }
    )
    assert crd_errors(rendered.one("RayService"), crds) == []
    cluster = rendered.service["rayClusterConfig"]
    assert cluster.get("gcsFaultToleranceOptions", {"backend": "off"})["backend"] == mode
    assert rendered.service["upgradeStrategy"]["type"] == upgrade
    assert ("clusterUpgradeOptions" in rendered.service["upgradeStrategy"]) == ("Incremental" in upgrade)


def test_foreign_kinds_have_what_they_need(everything: Rendered) -> None:
    """Structure only: the schemas of these kinds are not at hand."""
    found = {(m["apiVersion"], m["kind"]): m for m in everything.manifests}
    assert set(FOREIGN) <= set(found)
    for kind, fields in FOREIGN.items():
        for field in fields:
            assert dig(found[kind]["spec"], field), f"{kind}: {field}"
    known = {m["apiVersion"] for m in everything.manifests} - {api for api, _ in FOREIGN} - OURS
    assert known <= {"v1", "batch/v1", "policy/v1", "networking.k8s.io/v1"}


def test_everything_is_on(everything: Rendered) -> None:
    """The profile renders every template of the chart."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(profile("everything"), name=RELEASE, namespace=NAMESPACE)
    assert [name for name, text in files.items() if not text.strip()] == []


def test_no_two_objects_share_a_name(rendered: Rendered) -> None:
    names = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in rendered.manifests]
    names.append(("Service", NAMESPACE, rendered.service["serveService"]["metadata"]["name"]))
    assert len(set(names)) == len(names)


def test_every_image_has_a_version(rendered: Rendered) -> None:
    images = {container["image"] for container in containers(rendered)}
    assert images
    for image in images:
        assert "@sha256:" in image or re.search(r":[^/:]+$", image), image
        assert not image.endswith(":latest")


def test_pods_have_no_rights_they_do_not_need(rendered: Rendered) -> None:
    for spec in pod_specs(rendered):
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == 1000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*spec.get("initContainers", []), *spec["containers"]):
            if container["name"] == "logs":
                continue  # of the profile, not of the chart
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"]
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounts <= {volume["name"] for volume in spec.get("volumes", [])}
    scaled = rendered.service["rayClusterConfig"]["enableInTreeAutoscaling"]
    for name, group in rendered.groups.items():
        assert group["template"]["spec"]["automountServiceAccountToken"] is (scaled and name == "headgroup")


def test_head_and_workers_share_one_template(rendered: Rendered) -> None:
    """What all must have: Ray's niceness, its shared memory, a writable /tmp, KubeRay's port names."""
    head = rendered.groups["headgroup"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in rendered.groups.values():
        spec = group["template"]["spec"]
        ray_container = spec["containers"][0]
        env = {entry["name"]: entry for entry in ray_container["env"]}
        assert env["RAY_worker_niceness"]["value"] == "0"
        assert len(env) == len(ray_container["env"])
        mounts = {mount["mountPath"]: mount["name"] for mount in ray_container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "emptyDir" in volumes[mounts["/tmp"]]
        assert {"metrics", "serve"} <= {port["name"] for port in ray_container["ports"]}
    ports = rendered.service["serveService"]["spec"]["ports"]
    assert [port["name"] for port in ports] == ["serve"]


def test_selectors_match_pods(rendered: Rendered) -> None:
    serving = [labels(group) for group in rendered.groups.values()]
    others = [job["spec"]["template"]["metadata"]["labels"] for job in rendered.of("Job")]
    others += [pod["metadata"]["labels"] for pod in rendered.of("Pod")]

    def matched(selector: dict[str, str], among: list[dict[str, str]]) -> int:
        assert selector
        return sum(selector.items() <= each.items() for each in among)

    for policy in rendered.of("NetworkPolicy"):
        assert matched(policy["spec"]["podSelector"]["matchLabels"], serving) == len(serving)
        assert matched(policy["spec"]["podSelector"]["matchLabels"], others) == 0
        peers = policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
        assert matched(peers, serving) == len(serving)
    for budget in rendered.of("PodDisruptionBudget"):
        assert matched(budget["spec"]["selector"]["matchLabels"], serving) == 1
        assert isinstance(budget["spec"]["minAvailable"], int)  # all that Kubernetes takes for pods of a custom owner
    for monitor in rendered.of("PodMonitor"):
        assert matched(monitor["spec"]["selector"]["matchLabels"], serving) == len(serving)
        ports = {p["name"] for g in rendered.groups.values() for p in g["template"]["spec"]["containers"][0]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
    for service in rendered.of("Service"):
        assert matched(service["spec"]["selector"], serving) == len(serving)
    for monitor in rendered.of("ServiceMonitor"):
        services = [service["metadata"]["labels"] for service in rendered.of("Service")]
        services.append(rendered.service["serveService"]["metadata"]["labels"])
        assert matched(monitor["spec"]["selector"]["matchLabels"], services) == 1
    for spec in pod_specs(rendered):
        for constraint in spec.get("topologySpreadConstraints", []):
            assert matched(constraint["labelSelector"]["matchLabels"], serving) <= 1
    name = rendered.service["serveService"]["metadata"]["name"]
    for ingress in rendered.of("Ingress"):
        (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
        assert path["backend"]["service"] == {"name": name, "port": {"name": "serve"}}
    for route in rendered.of("HTTPRoute"):
        (backend,) = route["spec"]["rules"][0]["backendRefs"]
        assert backend == {"name": name, "port": rendered.service["serveService"]["spec"]["ports"][0]["port"]}


def test_everything_that_is_referred_to_is_rendered(rendered: Rendered) -> None:
    made = {(m["kind"], m["metadata"]["name"]) for m in rendered.manifests}
    given = {"huggingface", "redis", "registry", "site", "llm-tls", "models-on-disk"}  # by the profiles
    tls = {c["spec"]["secretName"] for c in rendered.of("Certificate")}

    def check(kind: str, name: str) -> None:
        assert (kind, name) in made or name in given or (kind == "Secret" and name in tls), (kind, name)

    for spec in pod_specs(rendered):
        for volume in spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                check("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
            if "configMap" in volume:
                check("ConfigMap", volume["configMap"]["name"])
            if "secret" in volume:
                check("Secret", volume["secret"]["secretName"])
        if "serviceAccountName" in spec:
            check("ServiceAccount", spec["serviceAccountName"])
    for container in containers(rendered):
        for entry in container.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                check("Secret", reference["name"])
                for secret in rendered.of("Secret"):
                    if secret["metadata"]["name"] == reference["name"]:
                        assert reference["key"] in secret["data"]
    check("Secret", rendered.service["rayClusterConfig"]["authOptions"]["secretName"])
