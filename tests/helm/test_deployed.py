"""The rendered Serve config on a real Ray: deployed, asked, and changed under load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from asking import Asking
from helm_rendering import Manifest, bounds, profile, render
from random_mixtral import save_random_mixtral
from served import eventually

from moe_ray.bench.free_port import free_port

EXPERTS = [f"Expert{number}" for number in range(8)]


@pytest.fixture(scope="module")
def serve_port(ray_cluster: None) -> Iterator[int]:
    """Port of the session's Serve. One that starts for these tests ends with them: other tests start it themselves."""
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        yield client.get_serve_details()["http_options"]["port"]
        return
    yield free_port()
    while _get_global_client(raise_if_no_controller_running=False) is not None:
        serve.shutdown()


@pytest.fixture(scope="module")
def small_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Mixtral that has the demo model's tokenizer, and so a word for everything: it can be talked to.

    Native kernels compute it, where there are some, so that its eight experts do not load torch.
    """
    import torch

    return save_random_mixtral(
        tmp_path_factory.mktemp("model") / "small",
        seed=0,
        dtype=torch.bfloat16,
        like=demo_model,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )


class Deployed:
    """The rendered Serve config on the session's Ray, sent as KubeRay sends it: to the dashboard."""

    def __init__(self, name: str, port: int, model: Path, directory: Path) -> None:
        self.name, self.url = name, f"http://127.0.0.1:{port}/{name}"
        self._port, self._model, self._directory = port, model, directory

    def apply(self, values: Manifest, **deployments: Manifest) -> None:
        """Deploy what `values` render to, but for its name, its port, the model, and labels that nodes here lack.

        `deployments` has further keys of some entries of the file's `deployments`.
        """
        import ray

        config = render(values).serve_config
        (application,) = config["applications"]
        application |= {"name": self.name, "route_prefix": f"/{self.name}"}
        config["http_options"] |= {"host": "127.0.0.1", "port": self._port}
        args = application["args"]
        args["model"]["path"] = str(self._model)
        del args["cache_dir"], args["trunk"]["labels"], args["experts"]["labels"]
        for entry in application["deployments"]:
            entry |= deployments.get(entry["name"], {})
        file = self._directory / "serve_config.yaml"
        file.write_text(yaml.safe_dump(config))
        dashboard = eventually(lambda: ray._private.worker.get_dashboard_url(), 30)  # type: ignore[attr-defined]
        done = subprocess.run(
            [Path(sys.executable).with_name("serve"), "deploy", file, "--address", f"http://{dashboard}"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "RAY_AUTH_MODE": "token"},
        )
        assert done.returncode == 0, done.stderr

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def pids(self) -> dict[str, set[int]]:
        """Processes of the replicas of each deployment."""
        from ray import serve

        def status(name: str) -> list[dict[str, Any]]:
            answers: list[dict[str, Any]] = (
                serve.get_deployment_handle(name, self.name).broadcast("status").results(timeout_s=10)
            )
            return answers

        return {name: {each["pid"] for each in status(name)} for name in ("Gateway", "Trunk", *EXPERTS)}

    def settled(self, **numbers: int) -> dict[str, set[int]] | None:
        """The processes, once these deployments have so many replicas and the application runs."""
        from ray import serve

        status = serve.status().applications[self.name]
        for name, number in numbers.items():
            if status.deployments[name].replica_states.get("RUNNING", 0) != number:
                return None
        if status.status != "RUNNING":
            return None
        pids = self.pids()
        return pids if all(len(pids[name]) == number for name, number in numbers.items()) else None

    def complete(self) -> str:
        body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text


@pytest.fixture
def deployed(request: pytest.FixtureRequest, serve_port: int, small_model: Path, tmp_path: Path) -> Iterator[Deployed]:
    from ray import serve

    name = f"helm-{request.node.callspec.id}"
    yield Deployed(name, serve_port, small_model, tmp_path)
    serve.delete(name)


def numbers(of: Manifest) -> dict[str, int]:
    return {name: bounds(render(of).deployments[name])[0] for name in EXPERTS}


@pytest.mark.parametrize("values", ["cpu-demo", "hot-experts"])
def test_one_expert_is_scaled_and_nobody_restarted(deployed: Deployed, values: str) -> None:
    """`helm upgrade` with another number for one expert, under requests: that expert changes, and nothing else does."""
    before = profile(values)
    before.get("experts", {}).pop("spares", None)  # one actor less to start here
    deployed.apply(before)
    eventually(deployed.ready, 120)
    pids = eventually(lambda: deployed.settled(**numbers(before)), 60)
    asked = ask(deployed)
    assert asked.returncode == 0, asked.stderr
    calm = deployed.complete()
    expert = "Expert2"
    after = json.loads(json.dumps(before))
    overrides = after.setdefault("experts", {}).setdefault("overrides", {})
    overrides["2"] = {"minReplicas": 2} if values == "hot-experts" else {"numReplicas": 2}
    with Asking(deployed.complete) as asking:
        deployed.apply(after)
        more = eventually(lambda: deployed.settled(**{expert: 2}), 60)
        deployed.apply(before)
        # Where it autoscales a replica above the least number goes when the policy says so, 30 s later: not waited for.
        less = eventually(lambda: deployed.settled(**{expert: 1}), 60) if values == "cpu-demo" else deployed.pids()
    if values == "cpu-demo":
        another_card_for_one_expert(deployed, before, expert, calm)
    others = set(pids) - {expert}
    assert len(asking.answers) >= 3
    assert set(asking.answers) == {calm}
    assert more[expert] > pids[expert]
    for now in (more, less):
        assert {name: now[name] for name in others} == {name: pids[name] for name in others}


def another_card_for_one_expert(deployed: Deployed, values: Manifest, expert: str, calm: str) -> None:
    """As the runbook does it, in `deployments`: its only replica is replaced, and serves until that is done."""
    was = deployed.pids()
    with Asking(deployed.complete) as asking:
        deployed.apply(values, **{expert: {"ray_actor_options": {"num_cpus": 0.2}}})

        def replaced() -> dict[str, set[int]] | None:
            pids = deployed.settled(**{expert: 1})
            return pids if pids is not None and pids[expert] != was[expert] else None

        now = eventually(replaced, 60)
    assert {**now, expert: None} == {**was, expert: None}
    assert set(asking.answers) == {calm}


def ask(deployed: Deployed) -> subprocess.CompletedProcess[str]:
    """The script of `helm test`, run as its pod runs it; of a random model any answer is right."""
    command = render().one("Pod", "-test")["spec"]["containers"][0]["command"]
    env = {"URL": deployed.url, "QUESTION": "What is the capital of France?", "EXPECT": "", "TIMEOUT_S": "20"}
    env |= {"API_KEYS": '["sk-first"]', "NO_PROXY": "*"}
    return subprocess.run([sys.executable, *command[1:]], env=env, capture_output=True, text=True, timeout=60)
