"""Secrets: given, made, and kept."""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from helm_rendering import CHART, NAMESPACE, RELEASE, Manifest, Rendered, render


def secret_values(rendered: Rendered) -> dict[str, str]:
    data = {key: value for secret in rendered.of("Secret") for key, value in secret["data"].items()}
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def test_secrets_are_made_where_none_are_given() -> None:
    made = secret_values(render())
    assert set(made) == {"api-keys", "cluster-token", "auth_token"}
    (key,) = json.loads(made["api-keys"])
    assert re.fullmatch(r"sk-\w{48}", key)
    assert all(len(value) >= 48 for value in made.values())
    assert len(set(made.values())) == 3
    again = secret_values(render())
    assert made["api-keys"] != again["api-keys"]  # no cluster to keep it: made anew


def test_secrets_that_are_given() -> None:
    auth: Manifest = {"apiKeys": {"values": ["a", "b"]}, "clusterToken": {"value": "c"}}
    given = render({"auth": auth})
    assert json.loads(secret_values(given)["api-keys"]) == ["a", "b"]
    assert secret_values(given)["cluster-token"] == "c"
    mine = {name: {"existingSecret": f"my-{name}"} for name in ("apiKeys", "clusterToken", "rayToken")}
    named = render({"auth": {**mine, "hfToken": {"enabled": True, "existingSecret": "my-hfToken"}}})
    assert named.of("Secret") == []
    env = {e["name"]: e for e in named.groups["experts"]["template"]["spec"]["containers"][0]["env"]}
    references = {name: e["valueFrom"]["secretKeyRef"]["name"] for name, e in env.items() if "valueFrom" in e}
    assert references == {
        "MOE_RAY_GATEWAY__API_KEYS": "my-apiKeys",
        "MOE_RAY_CLUSTER_TOKEN": "my-clusterToken",
        "HF_TOKEN": "my-hfToken",
    }
    assert named.service["rayClusterConfig"]["authOptions"]["secretName"] == "my-rayToken"


def test_only_a_given_secret_changes_the_pods() -> None:
    """A changed template is a new cluster: secrets made at random must not make one at each upgrade."""

    def templates(values: Manifest) -> list[Manifest]:
        return [group["template"] for group in render(values).groups.values()]

    assert templates({}) == templates({})
    assert templates({}) != templates({"auth": {"apiKeys": {"values": ["a"]}}})


class Cluster(http.server.BaseHTTPRequestHandler):
    """As much of a Kubernetes API as `lookup` asks: which kinds there are, and secrets by name."""

    kinds: ClassVar = {
        "v1": ["Secret", "ServiceAccount", "Pod"],
        "networking.k8s.io/v1": ["NetworkPolicy"],
        "policy/v1": ["PodDisruptionBudget"],
        "ray.io/v1": ["RayService"],
    }
    secrets: ClassVar[dict[str, Manifest]] = {}

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        found = self.discovery().get(path) or self.secrets.get(path.rpartition("/")[2])
        absent = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        body = json.dumps(found or absent).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def discovery(self) -> dict[str, Manifest]:
        groups = []
        answers: dict[str, Manifest] = {
            "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
        }
        for api, kinds in self.kinds.items():
            group, _, version = api.rpartition("/")
            if group:
                served = {"groupVersion": api, "version": version}
                groups.append({"name": group, "versions": [served], "preferredVersion": served})
            resources = [
                {
                    "name": f"{kind.lower()}s",
                    "singularName": kind.lower(),
                    "kind": kind,
                    "namespaced": True,
                    "verbs": ["get"],
                }
                for kind in kinds
            ]
            path = f"/apis/{api}" if group else f"/api/{api}"
            answers[path] = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": resources}
        return answers

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(
    shutil.which("helm") is None, reason="no helm on PATH: the engine of the other tests has no cluster"
)
def test_secrets_outlive_an_upgrade(tmp_path: Path) -> None:
    """`lookup` finds what the first revision made, in whatever an API server says there is."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cluster)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kubeconfig = tmp_path / "kubeconfig"
    cluster = {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    context = {"name": "fake", "context": {"cluster": "fake", "user": ""}}
    kubeconfig.write_text(yaml.safe_dump({"clusters": [cluster], "contexts": [context], "current-context": "fake"}))
    command = [
        "helm",
        "template",
        RELEASE,
        CHART,
        "--namespace",
        NAMESPACE,
        "--dry-run=server",
        "--disable-openapi-validation",
    ]

    def made(*flags: str) -> dict[str, Manifest]:
        env = {**os.environ, "KUBECONFIG": str(kubeconfig), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([*command, *flags], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        documents = [document for document in yaml.safe_load_all(done.stdout) if document]
        return {m["metadata"]["name"]: m for m in documents if m["kind"] == "Secret"}

    try:
        Cluster.secrets.clear()
        first = made()
        Cluster.secrets.update(first)
        second = made("--is-upgrade")
    finally:
        server.shutdown()
        server.server_close()
    assert len(first) == 3
    assert {name: m["data"] for name, m in second.items()} == {name: m["data"] for name, m in first.items()}
