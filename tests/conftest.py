"""What all tests share: the demo model, a small random Mixtral, one Ray cluster, and applications on it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiers
from random_mixtral import TOKENIZER, save_random_mixtral
from reference import Reference
from served import Served, deploy

from moe_ray.bench.free_port import free_port
from moe_ray.deploy.local_ray import prepare_local_ray
from moe_ray.model.compute.compute import has_cuda

if not has_cuda():  # before Triton is imported anywhere: without a card its kernels are interpreted, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
prepare_local_ray()  # before ray is imported anywhere
# A pool of compute threads beside a dozen other processes on few cores waits more than it computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain-cpu", action="store_true", help="as on a CPU without any instruction set beyond its base")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("plain_cpu"):
        tiers.hide_instruction_sets()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tiers.mark(item)
    items.sort(key=tiers.order)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> None:
    item = request._pyfuncitem
    if fixturedef.argname in tiers.SLOW_FIXTURES and not tiers.is_slow(item):
        pytest.fail(f"{item.nodeid} asks for {fixturedef.argname} while it runs: mark it slow")


@pytest.fixture(autouse=True)
def fast_tests_start_no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does not start in this process for a fast test."""
    if tiers.is_slow(request.node) or "ray" not in sys.modules:
        return

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError(f"{request.node.nodeid} starts Ray: mark it slow")

    monkeypatch.setattr(sys.modules["ray"], "init", refuse)


@pytest.fixture(scope="session", autouse=True)
def processes_are_as_installed() -> None:
    """What tests start finds the packages that moe_ray brings, without those of other programs that cost it time."""
    hidden = str(Path(__file__).parent / "as_installed")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [hidden, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real demo model, built into the user's cache if it is not there yet (about half a minute)."""
    from moe_ray.config import load_config
    from moe_ray.hub import resolve_model

    return resolve_model(load_config())


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-layer Mixtral in float32 with a vocabulary of 512 ids and no tokenizer."""
    return save_random_mixtral(
        tmp_path_factory.mktemp("random-mixtral"),
        seed=0,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=512,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.15,  # large enough that greedy decoding does not repeat itself
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(scope="session")
def readable_model(random_model: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Mixtral with the demo model's tokenizer, of which it has the first 512 ids."""
    directory = tmp_path_factory.mktemp("readable") / "model"
    shutil.copytree(random_model, directory)
    for name in TOKENIZER:
        shutil.copy(demo_model / name, directory / name)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return directory


@pytest.fixture(scope="session")
def kernel_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral in bfloat16 of shapes that the native kernels compute, with the demo model's tokenizer."""
    import torch

    return save_random_mixtral(
        tmp_path_factory.mktemp("for-kernels") / "model",
        seed=2,
        dtype=torch.bfloat16,
        like=demo_model,
        files=TOKENIZER,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for the whole session, on loopback only."""
    import ray
    from ray import serve

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=True,
        log_to_driver=False,
        object_store_memory=256 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def demo_reference(demo_model: Path) -> Reference:
    """The demo model in transformers (2.9 GB)."""
    return Reference(demo_model)


@pytest.fixture(scope="session")
def random_reference(random_model: Path) -> Reference:
    """The random Mixtral in transformers."""
    return Reference(random_model)


@pytest.fixture(scope="session")
def http_port(ray_cluster: None) -> int:
    """Port of the cluster's Serve proxy, on loopback."""
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    port = free_port()
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=LoggingConfig(log_level="ERROR"))
    return port


@pytest.fixture(scope="session")
def served_demo(demo_model: Path, http_port: int) -> Iterator[Served]:
    """The demo model in float32 (so that tokens can be compared exactly), every carrier open."""
    from ray import serve

    flags = {
        "model": {"path": str(demo_model), "served_name": "demo", "dtype": "float32"},
        "gateway": {"page": {"control": True}},
    }
    yield deploy("demo", http_port, flags)
    serve.delete("demo")


@pytest.fixture(scope="session")
def served_random(random_model: Path, demo_model: Path, http_port: int) -> Iterator[Served]:
    """The random 4-layer Mixtral in float32, two replicas of expert 3; the demo model lends its tokenizer."""
    from ray import serve

    for name in TOKENIZER:
        shutil.copy(demo_model / name, random_model / name)
    # The tokenizer's special ids lie outside this small vocabulary; generation_config.json says which do not.
    (random_model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    flags = {
        "model": {"path": str(random_model), "served_name": "random"},
        "experts": {"overrides": {3: {"num_replicas": 2}}},
        "adapters": {"runtime_loading": True},
    }
    yield deploy("random", http_port, flags)
    serve.delete("random")
