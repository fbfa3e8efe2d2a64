"""What the chart's tests share."""

from __future__ import annotations

import http.server
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from fake_hub import Hub
from helm_rendering import CHART, PROFILES, Rendered, profile, render


@pytest.fixture(scope="session", params=PROFILES, ids=lambda path: path.stem.removesuffix("-values"))
def rendered(request: pytest.FixtureRequest) -> Rendered:
    """Each profile in turn."""
    return render(yaml.safe_load(request.param.read_text()))


@pytest.fixture(scope="session")
def everything() -> Rendered:
    """The profile that switches every part on."""
    return render(profile("everything"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with KubeRay's CRDs and their validator, which are not part of this repository."""
    directory = Path(os.environ.get("MOE_RAY_SHARED") or CHART.parents[2] / "shared")
    if not (directory / "data" / "kuberay-crds").is_dir():
        pytest.skip(f"KubeRay's CRDs are not in {directory} (MOE_RAY_SHARED names another directory)")
    return directory


@pytest.fixture(scope="session")
def crds(shared: Path) -> dict[tuple[str, str], Any]:
    """(apiVersion, kind) → validator of KubeRay's resources, unknown fields refused."""
    sys.path.insert(0, str(shared / "tools"))
    try:
        import crd_validate
    finally:
        sys.path.remove(str(shared / "tools"))
    tool: ModuleType = crd_validate
    validators: dict[tuple[str, str], Any] = tool.load(str(shared / "data/kuberay-crds/ray.io_rayservices.yaml"))
    return validators


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of a Hub whose behaviour tests set in `Hub`."""
    Hub.files = {"config.json": b"{}", "model.safetensors": b"weights" * 100_000, "training.bin": b"unwanted"}
    Hub.asked.clear()
    Hub.info_works = Hub.tree_works = True
    Hub.slow = None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
