"""Prometheus and its promtool: from PATH, or out of Debian's package, which is unpacked into the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


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
