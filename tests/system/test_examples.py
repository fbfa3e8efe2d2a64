"""The examples as a newcomer would run them: scripts in processes of their own, the YAML through `serve deploy`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from served import Served, wait_ready

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    tested = {"chat_stream.py", "hot_experts.py", "many_at_once.py", "offline.py", "serve_config.yaml"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_help_says_what_it_does(script: str) -> None:
    said = run(script, "--help")
    assert "Run `" in said
    assert f"python examples/{script}" in said


def test_chat_stream(served_demo: Served) -> None:
    answer, usage = run("chat_stream.py", "--url", served_demo.url).strip().split("\n\n")
    assert "Paris" in answer
    assert usage == "37 tokens in, 8 tokens out"


def test_finetune_asks_each_model(served_demo: Served) -> None:
    question = "What is the capital of France?"
    asked, answered = run("finetune/ask.py", "--url", served_demo.url, question).strip().split("\n")
    assert asked == question
    assert answered.startswith("  demo: ")
    assert "Paris" in answered


def test_many_at_once(served_demo: Served) -> None:
    said = run("many_at_once.py", "--url", served_demo.url, "--max-tokens", "16")
    *answers, blank, total = said.strip().splitlines()
    assert len(answers) == 16
    assert all("tokens/s: " in line and line.endswith("…") for line in answers)
    assert not blank
    assert total.startswith("16 answers, 256 tokens in ")


def test_hot_experts(served_demo: Served) -> None:
    flags = ("-n", "3", "--calm", "2", "--hot", "4", "--cool", "2")
    *lines, blank, total = run("hot_experts.py", "--url", served_demo.url, *flags).strip().splitlines()
    assert [line.split()[2] for line in lines] == ["calm", "hot", "hot", "cool"]
    assert all(line.count("▮") == 8 for line in lines), "one replica of each expert"
    assert int(lines[2].split()[3]) > 0
    assert not blank
    assert total.endswith("tokens, 0 failed requests, 8 replicas at most")


@pytest.mark.slow
def test_offline() -> None:
    said = run("offline.py")
    assert "'The capital of France is' → ' Paris" in said
    assert "Rome" in said.split("What is the capital of Italy?")[1]


def test_serve_config(served_random: Served, http_port: int, tmp_path: Path) -> None:
    """The file as it is, but for what the session's cluster and the clock ask for: name, route, port, a small model."""
    import ray
    from ray import serve

    config = yaml.safe_load((EXAMPLES / "serve_config.yaml").read_text())
    (application,) = config["applications"]
    assert (application["name"], application["route_prefix"]) == ("moe-ray", "/")
    assert config["http_options"]["host"] == "127.0.0.1"
    application |= {"name": "from-yaml", "route_prefix": "/from-yaml"}
    application["args"]["model"]["path"] = served_random.config.model.path
    config["http_options"]["port"] = http_port
    file = tmp_path / "serve_config.yaml"
    file.write_text(yaml.safe_dump(config))
    deployed = subprocess.run(
        [Path(sys.executable).with_name("serve"), "deploy", file, "--address", dashboard_url(ray)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
    )
    try:
        assert deployed.returncode == 0, deployed.stderr
        assert serve.status().applications["from-yaml"] is not None
        url = f"http://127.0.0.1:{http_port}/from-yaml"
        wait_ready(url, 120)
        names = set(serve.status().applications["from-yaml"].deployments)
        assert names == {"Gateway", "Trunk", *(f"Expert{e}" for e in range(8))}
        body = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0}
        answers = [
            httpx.post(f"{base}/v1/completions", json=body, trust_env=False).json()["choices"][0]["text"]
            for base in (url, served_random.url)
        ]
        assert answers[0] == answers[1]
    finally:
        serve.delete("from-yaml")


def dashboard_url(ray: object) -> str:
    """Of the session's Ray."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        url = ray._private.worker.get_dashboard_url()  # type: ignore[attr-defined]
        if url:
            return f"http://{url}"
        time.sleep(0.2)
    raise AssertionError("Ray has no dashboard")
