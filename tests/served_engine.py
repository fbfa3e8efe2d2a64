"""An engine in the tests' process over the experts of a deployed application."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from served import Served

from moe_ray.config import load_config
from moe_ray.deploy.discovery import ExpertDiscovery
from moe_ray.deploy.link_options import link_options
from moe_ray.engine.build import build_engine
from moe_ray.engine.engine import Engine
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.transport import connect


@contextmanager
def engine_over(served: Served, carrier: str, **engine: object) -> Iterator[Engine]:
    """An engine of this process over the experts of a deployed application."""
    from ray import serve

    directory = Path(served.config.model.path)
    config = load_config(
        {"model": {"path": str(directory), "dtype": "float32", "max_model_len": 320}, "engine": engine}
    )
    checkpoint = Checkpoint.open(directory)
    pools: list[ExpertDispatcher] = []

    def experts(compute: object) -> ExpertDispatcher:
        if carrier == "local":
            pool = local_experts(checkpoint, Compute(Backend("float32")))
        else:
            model = checkpoint.config
            handles = [
                serve.get_deployment_handle(f"Expert{e}", served.app_name) for e in range(model.num_local_experts)
            ]
            discovery = ExpertDiscovery(handles)
            links = ReplicaTable(
                discovery.ask,
                lambda info: connect(carrier, info, link_options(config)),
                model.expert_keys,
            )
            links.start()
            pool = ExpertDispatcher(links, asker=discovery)
            deadline = time.monotonic() + 30
            while pool.missing() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not pool.missing()
        pools.append(pool)
        return pool

    built = build_engine(config, checkpoint, experts)
    yield built
    pools[0].close()
