"""What changes from one release to the next may break nothing: names, labels, and the commands in the notes."""

from __future__ import annotations

import json
import re

import pytest
from helm_rendering import Manifest, Rendered, render

KUBERAYS = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}
"""Labels that KubeRay gives its pods unless the template has them, and by which it selects the head."""

STEPWISE = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": {"gatewayClassName": "istio"}}


def downloading(**download: object) -> Manifest:
    return {"model": {"volume": {"enabled": True}, "download": {"enabled": True, "repo": "owner/mixtral", **download}}}


def job(values: Manifest) -> Manifest:
    return render(values).one("Job")


@pytest.mark.parametrize(
    "change",
    [
        {"image": {"tag": "0.2.0"}},
        {"imagePullSecrets": [{"name": "registry"}]},
        {"pod": {"podSecurityContext": {"fsGroup": 2000}}},
        {"cache": {"sizeLimit": "5Gi"}},
        {"auth": {"hfToken": {"enabled": True, "existingSecret": "hub"}}},
        downloading(resources={"limits": {"memory": "8Gi"}}),
        downloading(nodeSelector={"disk": "fast"}),
        downloading(tolerations=[{"operator": "Exists"}]),
        downloading(env=[{"name": "HTTPS_PROXY", "value": "http://proxy"}]),
        downloading(revision="abc"),
        downloading(directory="other"),
        downloading(convert="upcycle"),
    ],
    ids=lambda change: re.sub(r"\W+", " ", json.dumps(change))[-40:],
)
def test_a_job_with_another_pod_has_another_name(change: Manifest) -> None:
    """Kubernetes refuses to change the pod of a Job that there is."""
    before = job(downloading())
    changed = downloading()
    for key, value in change.items():
        changed[key] = value
    after = job(changed)
    assert after["spec"]["template"] != before["spec"]["template"]
    assert after["metadata"]["name"] != before["metadata"]["name"]


def test_a_job_with_the_same_pod_keeps_its_name() -> None:
    before = job(downloading())
    for change in ({"backoffLimit": 1}, {"activeDeadlineSeconds": 60}, {"hook": True}):
        after = job(downloading(**change))
        assert after["metadata"]["name"] == before["metadata"]["name"]
        assert after["spec"]["template"] == before["spec"]["template"]


def test_pods_keep_kuberays_own_labels() -> None:
    """Else `<fullname>-head-svc`, whose selector wants them, has no endpoints."""
    for group in render().groups.values():
        labels = group["template"]["metadata"]["labels"]
        assert KUBERAYS.items() <= (KUBERAYS | labels).items()


def test_two_releases_do_not_share_pods() -> None:
    one, other = render(release="a"), render(release="b")
    selector = one.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    for group in other.groups.values():
        assert not selector.items() <= group["template"]["metadata"]["labels"].items()


def test_a_group_that_sorts_last_is_rendered_last() -> None:
    """KubeRay lets a cluster that runs grow at the end of its groups only."""
    before = list(render().groups)
    assert list(render({"workerGroups": {"z-more": {}}}).groups) == [*before, "z-more"]
    assert list(render({"workerGroups": {"a-more": {}}}).groups) == ["headgroup", "a-more", *before[1:]]


def patches(rendered: Rendered) -> list[list[Manifest]]:
    """The JSON patches in the notes, with a number in the place of N."""
    found = re.findall(r"patch raycluster \$CLUSTER --type=json -p '(.*)'", rendered.notes)
    return [json.loads(text.replace('"value": N', '"value": 7')) for text in found]


@pytest.mark.parametrize("autoscaler", [True, False])
def test_the_notes_change_the_cluster_that_runs(autoscaler: bool) -> None:
    values = {"autoscaler": {"enabled": autoscaler}, "workerGroups": {"overflow": {"role": "any"}}}
    rendered = render(values)
    assert "status.activeServiceStatus.rayClusterName" in rendered.notes
    groups = rendered.service["rayClusterConfig"]["workerGroupSpecs"]
    found = patches(rendered)
    assert len(found) == len(groups) == 3
    for index, (test, *changes) in enumerate(found):
        assert test == {
            "op": "test",
            "path": f"/spec/workerGroupSpecs/{index}/groupName",
            "value": groups[index]["groupName"],
        }
        paths = {change["path"] for change in changes}
        fields = {"maxReplicas"} if autoscaler else {"maxReplicas", "replicas"}
        assert paths == {f"/spec/workerGroupSpecs/{index}/{field}" for field in fields}
        assert fields <= set(groups[index])


def test_traffic_in_steps_goes_through_the_gateway() -> None:
    """KubeRay names Services after clusters then, and ignores the one of the RayService."""
    rendered = render({"upgradeStrategy": STEPWISE})
    assert "serveService" not in rendered.service
    assert rendered.of("Pod") == []
    assert "get gateway r-moe-ray-gateway" in rendered.notes
    assert "serve-svc" not in rendered.notes
    assert "helm test" not in rendered.notes
    usual = render()
    assert "svc/r-moe-ray-serve-svc" in usual.notes
    assert "gateway" not in usual.notes.lower()


def test_notes_tell_what_is_on() -> None:
    redis = render({"gcsFaultTolerance": {"mode": "redis", "redis": {"address": "redis://redis:6379"}}})
    assert "delete rayservice r-moe-ray --wait" in redis.notes
    assert "delete rayservice" not in render().notes
    assert "networkPolicy.operatorFrom" in render().notes
    assert "networkPolicy.operatorFrom" not in render({"networkPolicy": {"enabled": False}}).notes
    asking = render({"test": {"timeoutSeconds": 900}}).notes
    (limit,) = re.findall(r"helm test .* --timeout (\d+)s", asking)
    assert int(limit) > 900
