"""The tools that check what is in cluster/."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster_files import shell


@pytest.fixture(scope="session")
def promtool() -> Path:
    """promtool: from PATH, or out of Debian's package `prometheus`, which is unpacked into the user's cache."""
    if found := shutil.which("promtool"):
        return Path(found)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-ray" / "test-tools"
    tool = cache / "prometheus" / "usr" / "bin" / "promtool"
    if not tool.exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            pytest.skip("no promtool on PATH, and no apt to get it with")
        lists = cache / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={lists}", "-o", "APT::Sandbox::User=root"]
        for step in (["update"], ["download", "prometheus"]):
            try:
                done = shell(*apt, *step, cwd=cache, timeout=120)
            except subprocess.TimeoutExpired:
                pytest.skip(f"no promtool: apt-get {step[0]} hung")
            if done.returncode:
                pytest.skip(f"no promtool: apt-get {step[0]} said {done.stderr.strip()[-200:]}")
        (package,) = cache.glob("prometheus_*.deb")
        shell("dpkg-deb", "-x", package, cache / "prometheus")
        package.unlink()
    return tool
