"""Applications that several test files share, each deployed once: real actors, real HTTP."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, deploy


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
