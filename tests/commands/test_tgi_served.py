"""`text-generation-launcher` serves: with a Ray of its own, on a port of its own, as TGI's start scripts call it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from moe_ray.bench.free_port import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = "text-generation-launcher"


def entry_point() -> str:
    """Python that does what the installed script does."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    module, _, function = scripts[SCRIPT].partition(":")
    return f"from {module} import {function}; {function}()"


@contextmanager
def launched(output: Path, *words: str, **env: str) -> Iterator[psutil.Popen]:
    """The launcher, which prints to `output`; killed with all its children at the end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MOE_RAY_"))}
    with output.open("w") as file:
        process = psutil.Popen(
            [sys.executable, "-c", entry_point(), *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**inherited, "COLUMNS": "80", "MOE_RAY_ENGINE__KV_CACHE_GIB": "0.25", **env},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        family = process.children(recursive=True) if process.is_running() else []
        for each in [*family, process]:
            if each.is_running():
                each.kill()
        process.wait(10)


@pytest.mark.slow
def test_the_launcher_serves_the_demo_model(demo_model: Path, tmp_path: Path) -> None:
    port = free_port()
    words = ["--model-id", str(demo_model), "--num-shard", "2", "--max-total-tokens", "512", "--usage-stats", "off"]
    env = {"PORT": str(port), "MAX_BATCH_TOTAL_TOKENS": "4096", "HOSTNAME": "a-container"}
    output = tmp_path / "out"
    with launched(output, *words, **env) as process:
        deadline = time.monotonic() + 150
        while f"http://127.0.0.1:{port}/v1" not in output.read_text():
            assert time.monotonic() < deadline, output.read_text()
            assert process.is_running(), output.read_text()
            assert process.status() != psutil.STATUS_ZOMBIE, output.read_text()
            time.sleep(0.1)
        said = output.read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            answer = http.post(
                "/generate", json={"inputs": "The capital of France is", "parameters": {"max_new_tokens": 5}}
            )
            info = http.get("/info").json()
            experts = http.get("/experts").json()["experts"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
    assert answer.status_code == 200
    assert "Paris" in answer.json()["generated_text"]
    assert (info["model_id"], info["max_total_tokens"], info["max_concurrent_requests"]) == (str(demo_model), 512, 128)
    assert len(experts) == 8
    actors = {replica["deployment"] for expert in experts for replica in expert["replicas"]}
    assert actors == {"Experts0-3", "Experts4-7"}
    for line in (
        "Args {",
        "    num_shard: 2,",
        "--num-shard 2: 8 experts in 2 actors of up to 4",
        "--usage-stats has no",
    ):
        assert line in said
    assert "HOSTNAME=a-container" in said
