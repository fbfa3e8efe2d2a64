"""`python tests/deploy/cluster_placement.py CASE` prints on which node and GPU Serve puts each actor.

Several raylets of this machine stand for nodes, with declared GPUs and labels; the actors hold nothing. A case takes
half a minute and a Ray of its own: one is a test, the others are run by hand. `MODEL` names a directory with a
config.json.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

from moe_ray.deploy.local_ray import prepare_local_ray

prepare_local_ray()

import ray  # noqa: E402 - after the environment is prepared
from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.serve.schema import LoggingConfig  # noqa: E402
from rich.console import Console  # noqa: E402

from moe_ray.commands.placement import on_cluster_cards  # noqa: E402
from moe_ray.commands.planned import planned  # noqa: E402
from moe_ray.config import load_config  # noqa: E402
from moe_ray.deploy import app  # noqa: E402
from moe_ray.hub import resolve_model  # noqa: E402

Nodes = list[dict[str, Any]]
GPU: dict[str, Any] = {"num_gpus": 1}
T4S: dict[str, Any] = {"num_gpus": 3, "labels": {"ray.io/accelerator-type": "T4"}}
CASES: dict[str, tuple[dict[str, Any], Nodes]] = {
    "cpus": ({}, [{}, {}, {}]),
    "a-gpu-each": ({"trunk": GPU, "experts": GPU}, [{"num_gpus": 3}] * 3),
    "half-a-gpu-each": ({"trunk": GPU, "experts": {"num_gpus": 0.5}}, [{"num_gpus": 2}] * 3),
    "planned": ({}, [T4S, T4S, T4S]),
    "planned-shared": ({}, [{**T4S, "num_gpus": 1}, {**T4S, "num_gpus": 2}, {}]),
    "planned-own-card": ({}, [T4S, {**T4S, "num_gpus": 1}, {}]),
    "labels": (
        {
            "trunk": {"labels": {"pool": "trunk"}},
            "experts": {
                "labels": {"pool": "!trunk"},
                "overrides": {3: {"labels": {"card": "in(a10g,l4)"}}},
            },
        },
        [{"labels": {"pool": "trunk"}}, {"labels": {"card": "t4"}}, {"labels": {"card": "l4"}}],
    ),
    "per-node": (
        {
            "experts": {
                "experts_per_actor": 4,
                "overrides": {0: {"num_replicas": 3, "max_replicas_per_node": 1}},
                "spares": [{"experts": {3: "0"}, "num_replicas": 2}],
            }
        },
        [{}, {}, {}],
    ),
}
TIMEOUT_S = 60.0


class Stub:
    """Says where it runs."""

    def __init__(self, *_: object) -> None:
        self._place = ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()

    async def place(self) -> tuple[str, list[int]]:
        return self._place


def main(flags: dict[str, Any], nodes: Nodes) -> None:
    """Start a cluster of `nodes`, deploy, print, take it down."""
    app.ExpertReplica = app.TrunkReplica = app.Gateway = Stub  # type: ignore[misc, assignment]
    common = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**common, "include_dashboard": False, **nodes[0]})
    ids = [cluster.head_node.node_id, *(cluster.add_node(**{**common, **node}).node_id for node in nodes[1:])]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="ERROR"))
        config = load_config({"model": {"path": os.environ["MODEL"]}, **flags})
        model = resolve_model(config)
        plan = planned(config, model, without_weights=True)
        config, _ = on_cluster_cards(config, model, plan, Console())
        serve.api._run(app.build_app(config), name="placed", _blocking=False)
        end = time.monotonic() + TIMEOUT_S
        while (status := serve.status().applications["placed"]).status != "RUNNING" and time.monotonic() < end:
            time.sleep(0.2)
        print(status.status.value)
        found: dict[int, list[str]] = {node: [] for node in range(len(ids))}
        for name in status.deployments:
            for node, gpus in serve.get_deployment_handle(name, "placed").broadcast("place").results(timeout_s=5):
                found[ids.index(node)].append(name + (f" (GPU {', '.join(map(str, gpus))})" if gpus else ""))
        for node, names in found.items():
            print(f"node {node}: {', '.join(sorted(names))}")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*CASES[sys.argv[1]])
