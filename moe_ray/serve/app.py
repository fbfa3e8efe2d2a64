"""From a configuration to the graph of Serve deployments: gateway → trunk → one deployment per expert."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from moe_ray.config import ActorOptions, Config, load_config
from moe_ray.hub import resolve_model
from moe_ray.model.model_config import ModelConfig
from moe_ray.serve.expert import ExpertReplica
from moe_ray.serve.gateway import Gateway
from moe_ray.serve.scaling import autoscaling_config
from moe_ray.serve.trunk import TrunkReplica

APP_NAME = "moe-ray"
CONTROL_CALLS = 64
"""Concurrent control-plane calls (endpoint, status) to one replica; tokens and rows do not count against it."""


def build(args: dict[str, Any]) -> Application:
    """Build the application from the `args` of a Serve config file: the tree of `moe_ray.config.Config`."""
    return build_app(load_config(args))


def build_app(config: Config) -> Application:
    """Build the application. Raises `CheckpointError` if the model is not there."""
    model = ModelConfig.load(resolve_model(config))
    experts = []
    if config.transport != "local":
        experts = [
            serve.deployment(ExpertReplica, name=f"Expert{expert}")
            .options(**_expert_options(config, expert))
            .bind(config, expert)
            for expert in range(model.num_local_experts)
        ]
    trunk = (
        serve.deployment(TrunkReplica, name="Trunk")
        .options(num_replicas=config.trunk.num_replicas, **_options(config.trunk))
        .bind(config, experts)
    )
    return (
        serve.deployment(Gateway, name="Gateway")
        .options(
            num_replicas=config.gateway.num_replicas,
            ray_actor_options={"num_cpus": config.gateway.num_cpus},
            max_ongoing_requests=config.gateway.max_ongoing_requests,
            graceful_shutdown_timeout_s=10,
        )
        .bind(config, trunk, experts)
    )


def _expert_options(config: Config, expert: int) -> dict[str, Any]:
    return {
        **_options(config.experts.of(expert)),
        "autoscaling_config": autoscaling_config(config.experts, expert),
        # A replica that is told to go answers on until trunks, which look every `refresh_s`, have let it go.
        "graceful_shutdown_timeout_s": config.experts.refresh_s + 5,
    }


def _options(actor: ActorOptions) -> dict[str, Any]:
    accelerator = {} if actor.accelerator_type is None else {"accelerator_type": actor.accelerator_type}
    return {
        "ray_actor_options": {
            "num_cpus": actor.num_cpus,
            "num_gpus": actor.num_gpus,
            "resources": dict(actor.resources),
            **accelerator,
        },
        "max_ongoing_requests": CONTROL_CALLS,
        "health_check_period_s": 5,
        "graceful_shutdown_timeout_s": 10,
    }
