"""Prometheus and its promtool: from PATH, or out of Debian's package, which is unpacked into the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from served import eventually

from moe_ray.bench.free_port import free_port


def prometheus_tool(name: str) -> Path:
    """Where `prometheus` or `promtool` is. Skips the test, with a reason, where it cannot be had."""
    if found := shutil.which(name):
        return Path(found)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-ray" / "test-tools"
    tool = cache / "prometheus" / "usr" / "bin" / name
    if not tool.exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            pytest.skip(f"no {name} on PATH, and no apt to get it with")
        lists = cache / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={lists}", "-o", "APT::Sandbox::User=root"]
        for step in (["update"], ["download", "prometheus"]):
            try:
                done = subprocess.run(
                    [*apt, *step], cwd=cache, timeout=120, capture_output=True, text=True, check=False
                )
            except subprocess.TimeoutExpired:
                pytest.skip(f"no {name}: apt-get {step[0]} hung")
            if done.returncode:
                pytest.skip(f"no {name}: apt-get {step[0]} said {done.stderr.strip()[-200:]}")
        (package,) = cache.glob("prometheus_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, cache / "prometheus"], timeout=60, check=True)
        package.unlink()
    return tool


@contextmanager
def running_prometheus(directory: Path, jobs: Sequence[dict[str, Any]]) -> Iterator[httpx.Client]:
    """Its HTTP API, once it has scraped each of `jobs` without a fault; it does so each second."""
    program, config = prometheus_tool("prometheus"), directory / "config.yaml"
    config.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": list(jobs)}))
    port = free_port()
    command = [
        *(program, f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"),
    ]
    with subprocess.Popen([*map(str, command)]) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
                eventually(lambda: process.poll() is not None or _scraped(client, len(jobs)), timeout_s=60)
                assert process.poll() is None
                yield client
        finally:
            process.terminate()


def answer(prometheus: httpx.Client, query: str) -> list[Any]:
    """The series that a query finds now."""
    response = prometheus.get("/api/v1/query", params={"query": query})
    assert response.status_code == 200, f"{query}: {response.text}"
    return response.json()["data"]["result"]  # type: ignore[no-any-return]


def _scraped(prometheus: httpx.Client, count: int) -> bool:
    try:
        response = prometheus.get("/api/v1/targets")
    except httpx.ConnectError:  # it has not started yet
        return False
    if response.status_code != 200:
        return False
    targets = response.json()["data"]["activeTargets"]
    faults = [target["lastError"] for target in targets if target["lastError"]]
    assert not faults, faults
    return len(targets) == count and all(target["health"] == "up" for target in targets)
