"""From a configuration to the graph of Serve deployments: gateway → trunk → one per expert, group or spare."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from moe_ray.config import Config, load_config
from moe_ray.config.actors import ActorOptions
from moe_ray.config.experts import ExpertOptions
from moe_ray.deploy.expert_replica import ExpertReplica
from moe_ray.deploy.gateway_replica import Gateway
from moe_ray.deploy.recorded_load import recorded_rows
from moe_ray.deploy.replica_targets import TRUNK, autoscaling_config, trunk_autoscaling_config
from moe_ray.deploy.stored_responses import StoredResponses
from moe_ray.deploy.trunk_replica import TrunkReplica
from moe_ray.deploy.variants import variants_of
from moe_ray.experts.planning.cards import GIB
from moe_ray.experts.planning.placement import Holding, holdings, with_variants
from moe_ray.experts.server.expert_memory import ExpertMemory
from moe_ray.experts.sharing import added_keys
from moe_ray.hub import resolve_model
from moe_ray.model.model_config import ModelConfig

HEALTH_CHECK_S = 1.0
"""Serve learns by its checks that a process is gone, and replaces it then."""
CONTROL_CALLS = 64
"""Concurrent control-plane calls (endpoint, status) to one replica; tokens and rows do not count against it."""


def build(args: dict[str, Any]) -> Application:
    """Build the application from the `args` of a Serve config file: the tree of `moe_ray.config.Config`.

    Unless trunks autoscale, their number is the one in `args` or in the file's `deployments`, not set by hand.
    """
    return build_app(load_config(args), trunks_by_hand=False)


def build_app(config: Config, trunks_by_hand: bool = True) -> Application:
    """Build the application. Raises `CheckpointError` if the model is not there, `ConfigError` if it lacks a key.

    `trunks_by_hand`: where trunks do not autoscale, `moe-ray scale` may change their number.
    """
    model = ModelConfig.load(resolve_model(config))
    experts, rows = [], recorded_rows(config, model)
    layers, count = model.num_hidden_layers, model.num_local_experts
    config = config.model_copy(update={"experts": config.experts.grouped(count)})
    variants = variants_of(config)
    if config.transport != "local":
        spares = config.experts.spare_keys(layers, count)
        placed = holdings(layers, count, config.experts.group_size, spares)
        added = added_keys((variant.numbers for variant in variants), count)
        for holding in with_variants(placed, added, count):
            actor = _actor(config, holding)
            experts.append(
                serve.deployment(ExpertReplica, name=holding.name)
                .options(**_expert_options(config, holding))
                .bind(
                    config.computing_on(actor.device),
                    holding,
                    actor.threads or 1,
                    actor.quantize,
                    _memory(actor, rows),
                )
            )
    trunk = (
        serve.deployment(TrunkReplica, name="Trunk")
        .options(**_trunk_options(config, trunks_by_hand))
        .bind(config.computing_on(config.trunk.device), experts)
    )
    others = [
        serve.deployment(TrunkReplica, name=variant.trunk_name)
        .options(**_trunk_options(variant.config, by_hand=False, unit=variant.trunk_name))
        .bind(variant.config.computing_on(config.trunk.device), experts, variant.numbers)
        for variant in variants
    ]
    return (
        serve.deployment(Gateway, name="Gateway")
        .options(
            num_replicas=config.gateway.num_replicas,
            ray_actor_options={"num_cpus": config.gateway.num_cpus},
            max_ongoing_requests=config.gateway.max_ongoing_requests,
            graceful_shutdown_timeout_s=10,
        )
        .bind(config, trunk, experts, shared_responses(config), others)
    )


def shared_responses(config: Config) -> Application | None:
    """What keeps the responses of several gateways; one gateway keeps its own."""
    if config.gateway.num_replicas == 1 or not config.gateway.responses_memory_mib:
        return None
    deployment = serve.deployment(StoredResponses, name="StoredResponses")
    return deployment.options(
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=config.gateway.num_replicas * config.gateway.max_ongoing_requests,
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=1,
    ).bind(config)


def _trunk_options(config: Config, by_hand: bool, unit: str = TRUNK) -> dict[str, Any]:
    trunk = config.trunk
    options = _options(trunk)
    # A trunk that is told to go lets its requests end first; then it has what every actor has.
    options["graceful_shutdown_timeout_s"] += trunk.drain_s
    if by_hand or trunk.autoscale.enabled:
        return {**options, "autoscaling_config": trunk_autoscaling_config(trunk, config.engine.max_num_seqs, unit)}
    return {**options, "num_replicas": trunk.num_replicas}


def _actor(config: Config, holding: Holding) -> ActorOptions:
    return config.experts.of(holding.experts[0]) if holding.spare is None else config.experts.spares[holding.spare]


def _memory(actor: ActorOptions, rows: list[list[float]] | None) -> ExpertMemory:
    budget = None if actor.gpu_memory_gib is None else int(actor.gpu_memory_gib * GIB)
    offload = int(actor.cpu_offload_gib * GIB) if isinstance(actor, ExpertOptions) else 0
    return ExpertMemory(budget, offload, None if rows is None else tuple(map(tuple, rows)))


def _expert_options(config: Config, holding: Holding) -> dict[str, Any]:
    if holding.spare is None:
        first = holding.experts[0]
        replicas = {
            "autoscaling_config": autoscaling_config(config.experts, first),
            "max_replicas_per_node": config.experts.of(first).max_replicas_per_node,
        }
    else:
        replicas = {"num_replicas": config.experts.spares[holding.spare].num_replicas}
    return {
        **_options(_actor(config, holding)),
        **replicas,
        # A replica that is told to go answers on until its successor has loaded, and until trunks, which look every
        # `refresh_s`, have let it go.
        "graceful_shutdown_timeout_s": config.experts.handover_s + config.experts.refresh_s + 10,
    }


def _options(actor: ActorOptions) -> dict[str, Any]:
    accelerator = {} if actor.accelerator_type is None else {"accelerator_type": actor.accelerator_type}
    labels = {"label_selector": dict(actor.labels)} if actor.labels else {}
    return {
        "ray_actor_options": {
            "num_cpus": actor.num_cpus,
            "num_gpus": actor.num_gpus or 0,
            "resources": dict(actor.resources),
            **accelerator,
            **labels,
        },
        "max_ongoing_requests": CONTROL_CALLS,
        "health_check_period_s": HEALTH_CHECK_S,
        "graceful_shutdown_timeout_s": 10,
    }
