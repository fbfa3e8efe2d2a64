"""Actors with budgets, and with layers in the host's memory, as Serve runs them: on CPUs, which count bytes alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from served import Served, complete, deploy, statuses

from moe_ray.config import load_config
from moe_ray.deploy.app import build_app
from moe_ray.deploy.trunk_actor import _keep_to_budget
from moe_ray.errors import OverBudget
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend

LAYER = 3 * 64 * 112 * 4
GIB = 2**30


@pytest.mark.slow
def test_offloaded_experts_within_budgets_answer_as_others(served_random: Served, http_port: int) -> None:
    from ray import serve

    model = {"path": served_random.config.model.path, "served_name": "random", "kernels": "torch"}
    # Three of four layers are copied into two buffers, when they are called.
    memory = {"cpu_offload_gib": 2.5 * LAYER / GIB, "gpu_memory_gib": 3 * LAYER / GIB}
    flags = {"model": model, "experts": {"experts_per_actor": 1, **memory}, "trunk": {"gpu_memory_gib": 1}}
    served = deploy("offloaded", http_port, flags)
    for prompt in (list(range(3, 40)), [7]):
        assert complete(served, prompt) == complete(served_random, prompt)
    (status,) = statuses(served, "Expert3")
    assert status["weight_bytes"] == 4 * LAYER
    serve.delete("offloaded")


@pytest.mark.slow
def test_an_actor_over_its_budget_does_not_start(served_random: Served) -> None:
    from ray import serve

    flags = {
        "model": {"path": served_random.config.model.path},
        "experts": {"overrides": {2: {"gpu_memory_gib": 2 * LAYER / GIB}}},
    }
    with pytest.raises(RuntimeError):
        serve.run(build_app(load_config(flags)), name="too-large", route_prefix="/too-large")
    deployments = serve.status().applications["too-large"].deployments
    assert "OverBudget: Expert2, 4 layers on the card: needs" in deployments["Expert2"].message
    serve.delete("too-large")


def test_a_trunk_over_its_budget_is_refused(random_model: Path) -> None:
    checkpoint, compute = Checkpoint.open(random_model), Compute(Backend("float32"))
    _keep_to_budget(load_config({"trunk": {"gpu_memory_gib": 0.1}}), checkpoint, compute, "Trunk")
    _keep_to_budget(load_config(), checkpoint, compute, "Trunk")
    with pytest.raises(OverBudget, match=r"Trunk: needs \S+ GiB, its budget \(gpu_memory_gib\) is 0\.0001 GiB"):
        _keep_to_budget(load_config({"trunk": {"gpu_memory_gib": 1e-4}}), checkpoint, compute, "Trunk")
    checkpoint.close()
