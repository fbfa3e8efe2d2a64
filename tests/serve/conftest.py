"""Applications that several test files share, each deployed once: real actors, real HTTP."""

from __future__ import annotations

import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_ray.config import Config, load_config


@dataclass(frozen=True)
class Served:
    """A deployed application."""

    app_name: str
    url: str
    config: Config


@pytest.fixture(scope="session")
def http_port(ray_cluster: None) -> int:
    """Port of the cluster's Serve proxy, on loopback."""
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=LoggingConfig(log_level="ERROR"))
    return port


def deploy(app_name: str, http_port: int, flags: dict[str, Any]) -> Served:
    """Deploy an application under /app_name and wait until it is ready."""
    from ray import serve

    from moe_ray.serve.app import build_app

    config = load_config(flags)
    serve.run(build_app(config), name=app_name, route_prefix=f"/{app_name}")
    served = Served(app_name, f"http://127.0.0.1:{http_port}/{app_name}", config)
    wait_ready(served.url)
    return served


def wait_ready(url: str, timeout_s: float = 60.0) -> None:
    deadline, said = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except urllib.error.HTTPError as error:
            said = error.read().decode()
        except OSError as error:
            said = str(error)
        time.sleep(0.1)
    raise AssertionError(f"{url} is not ready: {said}")


@pytest.fixture(scope="session")
def served_demo(demo_model: Path, http_port: int) -> Iterator[Served]:
    """The demo model in float32 (so that tokens can be compared exactly), every carrier open."""
    from ray import serve

    yield deploy("demo", http_port, {"model": {"path": str(demo_model), "served_name": "demo", "dtype": "float32"}})
    serve.delete("demo")


@pytest.fixture(scope="session")
def served_random(random_model: Path, demo_model: Path, http_port: int) -> Iterator[Served]:
    """The random 4-layer Mixtral in float32, two replicas of expert 3; the demo model lends its tokenizer."""
    from ray import serve

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, random_model / name)
    # The tokenizer's special ids lie outside this small vocabulary; generation_config.json says which do not.
    (random_model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    flags = {
        "model": {"path": str(random_model), "served_name": "random"},
        "experts": {"overrides": {3: {"num_replicas": 2}}},
    }
    yield deploy("random", http_port, flags)
    serve.delete("random")
