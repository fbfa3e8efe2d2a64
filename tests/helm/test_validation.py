"""Wrong values, and right ones that do not go together: each is refused with the name of the key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import helm_python as helm
import kubernetes_validate
import pytest
from helm_rendering import CHART, Manifest, render


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"modle": {}}, "modle"),
        ({"model": {"pth": "x"}}, "pth"),
        ({"experts": {"overrides": {"3": {"minReplica": 2}}}}, "minReplica"),
        ({"experts": {"overrides": {"three": {}}}}, "three"),
        ({"experts": {"autoscale": {"target": 0.5}}}, "target"),
        ({"experts": {"onExpertLoss": "renormalize"}}, "onExpertLoss"),
        ({"engine": {"max_num_seqs": 8}}, "max_num_seqs"),
        ({"workerGroups": {"experts": {"role": "expert"}}}, "role"),
        ({"workerGroups": {"experts": {"nodeselector": {}}}}, "nodeselector"),
        ({"gcsFaultTolerance": {"mode": "rockdb"}}, "mode"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"transport": "tcp"}, "transport"),
        ({"logFormat": "logfmt"}, "logFormat"),
        ({"model": {"aliases": [" "]}}, "aliases"),
        ({"gateway": {"page": {"controls": True}}}, "controls"),
        ({"gateway": {"tgi": {"maxBestOf": 0}}}, "maxBestOf"),
        ({"tracing": {"otlpEndpoint": "collector:4317"}}, "otlpEndpoint"),
        ({"trunk": {"labels": {"zone": "in a"}}}, "zone"),
        ({"pod": {"resources": {"request": {}}}}, "request"),
        ({"serve": {"port": "http"}}, "port"),
        ({"serve": {"httpOptions": {"request_timeout": 5}}}, "request_timeout"),
        ({"serve": {"loggingConfig": {"level": "INFO"}}}, "level"),
        ({"serve": {"loggingConfig": {"log_level": "info"}}}, "log_level"),
        ({"pod": {"tolerations": [{"keys": "spot"}]}}, "keys"),
        ({"pod": {"affinity": {"nodeAfinity": {}}}}, "nodeAfinity"),
        ({"pod": {"affinity": {"nodeAffinity": {"required": {}}}}}, "nodeAffinity"),
        ({"pod": {"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone"}]}}, "topologySpreadConstraints"),
        ({"pod": {"securityContext": {"allowPrivilegeEscalations": False}}}, "allowPrivilegeEscalations"),
        ({"pod": {"podSecurityContext": {"fsgroup": 1}}}, "fsgroup"),
        ({"pod": {"podSecurityContext": {"seccompProfile": {"type": "Default"}}}}, "type"),
        ({"pod": {"livenessProbe": {"httpget": {"port": 1}}}}, "httpget"),
        ({"pod": {"lifecycle": {"prestop": {}}}}, "prestop"),
        ({"pod": {"volumes": [{"name": "a", "emptydir": {}}]}}, "emptydir"),
        ({"pod": {"volumeMounts": [{"name": "a", "path": "/a"}]}}, "path"),
        ({"pod": {"sidecars": [{"name": "a", "img": "a:1"}]}}, "img"),
        ({"pod": {"envFrom": [{"secret": {"name": "a"}}]}}, "secret"),
        ({"pod": {"env": [{"name": "A", "valueFrom": {"secretRef": {}}}]}}, "valueFrom"),
        ({"pod": {"resources": {"limits": {"gpu": 1}}}}, "gpu"),
        ({"pod": {"resources": {"limits": {"mem": "1Gi"}}}}, "mem"),
        ({"head": {"startupProbe": {"periodSecond": 1}}}, "periodSecond"),
        ({"workerGroups": {"experts": {"tolerations": [{"efect": "NoSchedule"}]}}}, "efect"),
        ({"workerGroups": {"experts": {"rayLabels": {"zone": "in(a)"}}}}, "zone"),
        ({"workerGroups": {"experts": {"shmSize": "1GB"}}}, "shmSize"),
        ({"model": {"download": {"tolerations": [{"keys": "a"}]}}}, "keys"),
        ({"model": {"download": {"convert": "up-cycle"}}}, "convert"),
        ({"model": {"download": {"upcycle": {"top_k": 2}}}}, "top_k"),
        ({"networkPolicy": {"clientsFrom": [{"namespaceselector": {}}]}}, "namespaceselector"),
        ({"ingress": {"tls": [{"secret": "a"}]}}, "secret"),
        ({"httpRoute": {"parentRefs": [{"nam": "a"}]}}, "nam"),
        ({"experts": {"labels": {"zone": "in(a,)"}}}, "zone"),
        ({"trunk": {"labels": {"zone": "in(,a)"}}}, "zone"),
        ({"experts": {"overrides": {"3": {"labels": {"zone": "a,b"}}}}}, "zone"),
        ({"auth": {"apiKeys": {"values": ["a key"]}}}, "0"),
        ({"auth": {"apiKeys": {"values": ["key\n"]}}}, "0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_typo_is_named(values: Manifest, said: str) -> None:
    with pytest.raises(helm.HelmError) as raised:
        render(values)
    assert re.search(rf"['/.\"]{said}\b", str(raised.value)), str(raised.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"experts": {"overrides": {"8": {"numReplicas": 2}}}}, "experts.overrides.8: there is no such expert"),
        ({"workerGroups": {"trunk": {"enabled": False}}}, "none has the role trunk or any"),
        ({"workerGroups": {"experts": {"enabled": False}}}, "none has the role experts or any"),
        ({"workerGroups": {"experts": {"replicas": 5}}}, "workerGroups.experts.maxReplicas: 4 is below replicas (5)"),
        ({"experts": {"numReplicas": 4, "maxReplicas": 2}}, "maxReplicas of Expert0 is 2, below the 4"),
        ({"model": {"download": {"enabled": True, "repo": "a/b"}}}, "set model.volume.enabled"),
        ({"tls": {"enabled": True}}, "give tls.existingSecret"),
        (
            {"tls": {"enabled": True, "certManager": {"enabled": True, "issuerRef": {"kind": "Issuer"}}}},
            "tls.certManager.issuerRef.name",
        ),
        ({"gcsFaultTolerance": {"mode": "redis"}}, "gcsFaultTolerance.redis.address"),
        (
            {"gcsFaultTolerance": {"mode": "rocksdb", "rocksdb": {"claimName": "gcs"}}},
            "rocksdb.claimName: in an upgrade",
        ),
        ({"ingress": {"enabled": True}}, "ingress.hosts"),
        ({"rayService": {"initializingTimeout": "2 hours"}}, "rayService.initializingTimeout"),
        ({"rayService": {"initializingTimeout": "2d"}}, "rayService.initializingTimeout"),
        ({"rayService": {"initializingTimeout": "0s"}}, "rayService.initializingTimeout"),
        ({"experts": {"autoscale": {"enabled": True}}}, "experts.autoscale.enabled: nothing could grow"),
        ({"trunk": {"autoscale": {"enabled": True}}}, "trunk.autoscale.enabled: nothing could grow"),
        (
            {"trunk": {"minReplicas": 2, "maxReplicas": 2, "autoscale": {"enabled": True}}},
            "trunk.autoscale.enabled: nothing could grow",
        ),
        (
            {"experts": {"maxReplicas": 2, "autoscale": {"enabled": True, "intervalS": 2}}},
            "experts.autoscale.lookBackS: 3 must be at least twice",
        ),
        ({"engine": {"promptLookupMin": 3, "promptLookupMax": 2}}, "engine.promptLookupMin: 3 must be at most"),
        ({"engine": {"draftModel": "a/b", "speculative": "ngram"}}, "engine.draftModel: engine.speculative must be"),
        ({"engine": {"speculative": "draft"}}, "engine.speculative: draft needs engine.draftModel"),
        ({"engine": {"speculative": "auto", "draftQuantize": "int8"}}, "engine.draftQuantize: there is no"),
        ({"engine": {"promptLookupMax": 1}}, "engine.promptLookupMin: 2 must be at most"),
        (
            {"workerGroups": {"more": {"replicas": 1, "minReplicas": 2}}},
            "workerGroups.more.maxReplicas: 1 is below replicas (1) or minReplicas (2)",
        ),
        ({"workerGroups": {"trunk": {"minReplicas": 3}}}, "workerGroups.trunk.maxReplicas: 2 is below"),
        ({"head": {"rayStartParams": {"num-cpus": "4"}}}, "head.rayStartParams.num-cpus"),
        (
            {"workerGroups": {"experts": {"rayStartParams": {"metrics-export-port": "9000"}}}},
            "workerGroups.experts.rayStartParams.metrics-export-port",
        ),
        ({"workerGroups": {"experts": {"rayStartParams": {"labels": "a=b"}}}}, "use workerGroups.experts.rayLabels"),
        ({"workerGroups": {"experts": {"rayLabels": {"moe-ray/role": "any"}}}}, "rayLabels.moe-ray/role"),
        ({"pod": {"labels": {"app.kubernetes.io/name": "x"}}}, "pod.labels.app.kubernetes.io/name"),
        ({"commonLabels": {"app.kubernetes.io/name": "x"}}, "commonLabels.app.kubernetes.io/name"),
        (
            {"workerGroups": {"experts": {"resources": {"limits": {"nvidia.com/gpu": 2}}, "gpu": {"count": 1}}}},
            "workerGroups.experts.resources.limits: says 2 of nvidia.com/gpu, and gpu.count says 1",
        ),
        (
            {"workerGroups": {"experts": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}},
            "workerGroups.experts.resources.limits: says 1 of nvidia.com/gpu, and gpu.count says 0",
        ),
        ({"head": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, "the head has none"),
        (
            {"workerGroups": {"experts": {"rayStartParams": {"object-store-memory": "536870913"}}}},
            "workerGroups.experts.rayStartParams.object-store-memory: 536870913 bytes do not fit",
        ),
        ({"head": {"rayStartParams": {"object-store-memory": "1Gi"}}}, "must be a number of bytes"),
        ({"workerGroups": {"experts": {"shmSize": "64Mi"}}}, "workerGroups.experts.shmSize: 64Mi is too small"),
        ({"pod": {"shmSize": "4Gi"}}, "head.shmSize: 4Gi counts as memory"),
        ({"experts": {"acceleratorType": "T4"}}, "experts.acceleratorType: no worker group for experts"),
        (
            {"experts": {"overrides": {"3": {"acceleratorType": "L4"}}}},
            "experts.overrides.3.acceleratorType: no worker group",
        ),
        (
            {
                "trunk": {"acceleratorType": "T4"},
                "workerGroups": {"experts": {"gpu": {"count": 1, "acceleratorType": "T4"}}},
            },
            "trunk.acceleratorType: no worker group for trunk",
        ),
        (
            {
                "upgradeStrategy": {
                    "type": "NewClusterWithIncrementalUpgrade",
                    "clusterUpgradeOptions": {"gatewayClassName": "a", "stepSizePercent": 50, "maxSurgePercent": 25},
                }
            },
            "stepSizePercent: 50 must be at most maxSurgePercent (25)",
        ),
        ({"upgradeStrategy": {"type": "NewClusterWithIncrementalUpgrade"}}, "gatewayClassName"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
        ({"auth": {"hfToken": {"enabled": True}}}, "auth.hfToken: give value or existingSecret"),
        (
            {"workerGroups": {"experts": {"rayResources": {"CPU": "1"}, "rayStartParams": {"num-cpus": "1"}}}},
            "not in both",
        ),
        (
            {"experts": {"expertsPerActor": 2, "overrides": {"2": {"numReplicas": 2}, "3": {"numReplicas": 3}}}},
            "experts.overrides.2 and experts.overrides.3 differ",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_refused(values: Manifest, said: str) -> None:
    with pytest.raises(helm.HelmError) as raised:
        render(values)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "service",
    [
        {"name": "llm"},
        {"type": "LoadBalancer"},
        {"port": 80},
        {"nodePort": 30000},
        {"annotations": {"a": "b"}},
        {"loadBalancerClass": "a"},
        {"loadBalancerSourceRanges": ["10.0.0.0/8"]},
        {"sessionAffinity": "ClientIP"},
    ],
    ids=lambda service: next(iter(service)),
)
def test_a_service_that_kuberay_would_ignore_is_refused(service: Manifest) -> None:
    options = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": {"gatewayClassName": "istio"}}
    with pytest.raises(helm.HelmError, match=rf"service\.{next(iter(service))}: .*r-moe-ray-gateway"):
        render({"upgradeStrategy": options, "service": service})
    render({"upgradeStrategy": {"type": "NewCluster"}, "service": service})


@pytest.mark.parametrize("timeout", ["90m", "1h30m", "1.5h", "600"])
def test_time_limits_that_kuberay_reads(timeout: str) -> None:
    service = render({"rayService": {"initializingTimeout": timeout}}).one("RayService")
    assert service["metadata"]["annotations"]["ray.io/initializing-timeout"] == timeout


def test_what_goes_together_is_not_refused() -> None:
    for values in (
        {"gcsFaultTolerance": {"mode": "rocksdb", "rocksdb": {"claimName": "a"}}, "upgradeStrategy": {"type": "None"}},
        {"experts": {"autoscale": {"enabled": True}, "overrides": {"3": {"maxReplicas": 2}}}},
        {"experts": {"labels": {"zone": "!in(a, b-1)"}}, "trunk": {"labels": {"zone": "!a"}}},
        {"autoscaler": {"enabled": False}, "experts": {"acceleratorType": "T4"}},
        {"workerGroups": {"experts": {"resources": {"limits": {"nvidia.com/gpu": "2"}}, "gpu": {"count": 2}}}},
        {"workerGroups": {"experts": {"shmSize": "1.5G", "rayStartParams": {"object-store-memory": "1500000000"}}}},
        {
            "experts": {"acceleratorType": "T4"},
            "workerGroups": {"experts": {"rayResources": {"accelerator_type:T4": "1"}}},
        },
    ):
        render(values)


KINDS = {
    "tolerations": "Toleration",
    "affinity": "Affinity",
    "spreadConstraints": "TopologySpreadConstraint",
    "probe": "Probe",
    "handler": "LifecycleHandler",
    "lifecycle": "Lifecycle",
    "podSecurityContext": "PodSecurityContext",
    "containerSecurityContext": "SecurityContext",
    "envFrom": "EnvFromSource",
    "volumes": "Volume",
    "volumeMounts": "VolumeMount",
    "containers": "Container",
    "resources": "ResourceRequirements",
}
"""Definition of our schema → kind of Kubernetes."""

GONE = {"flocker", "gitRepo"}
"""Volumes that Kubernetes names and no longer mounts."""


@pytest.mark.parametrize("version", ["1.28.0", "1.33.0"])
def test_no_field_of_kubernetes_is_refused(version: str) -> None:
    """Our definitions name all fields that Kubernetes has, so that only typos are refused."""
    schemas = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    theirs = json.loads((schemas / f"v{version}-local" / "_definitions.json").read_text())["$defs"]
    ours = json.loads((CHART / "values.schema.json").read_text())["$defs"]
    fields = {name.rpartition(".core.v1.")[2]: kind.get("properties", {}) for name, kind in theirs.items()}
    for name, kind in KINDS.items():
        definition = ours[name].get("items", ours[name])
        assert set(fields[kind]) - GONE <= set(definition["properties"]), name
