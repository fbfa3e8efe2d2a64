"""What a trunk's Serve replica holds: its weights and links, made with Ray's help, and the runtime over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from moe_ray.config import Config
from moe_ray.deploy.discovery import ExpertDiscovery
from moe_ray.deploy.link_options import link_options
from moe_ray.deploy.loading_board import reporter
from moe_ray.deploy.metrics import Reporter, TrunkMetrics
from moe_ray.deploy.open_tracing import open_tracing
from moe_ray.deploy.replica_targets import KV_USE, RUNNING, WAITING
from moe_ray.deploy.vllm_metrics import EngineMetrics
from moe_ray.engine.build import build_engine
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.local import local_experts
from moe_ray.experts.planning.cards import GIB
from moe_ray.experts.planning.footprint import WeightsHeld
from moe_ray.experts.sharing import ExpertNumbers
from moe_ray.hub import open_draft, resolve_adapter, resolve_model
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.card_memory import check_budget, limit_card_memory
from moe_ray.model.compute.compute import Compute, limit_torch_threads
from moe_ray.model.formats.held import HeldAs
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import weights_of_trunk
from moe_ray.text.vocabulary import token_bytes_of
from moe_ray.transport import CARRIERS, best_carrier, connect
from moe_ray.trunk.runtime import TrunkPlace, TrunkRuntime

logger = logging.getLogger(__name__)


class TrunkActor:
    """A trunk in a Ray actor."""

    def __init__(
        self,
        config: Config,
        experts: Sequence[DeploymentHandle],
        deployment: str,
        replica_id: str,
        numbers: ExpertNumbers | None = None,
    ) -> None:
        """Load, link and listen. `experts` is empty for `transport: local`. Raises `CheckpointError`, `ConfigError`.

        `numbers`: by which `experts` know those of this model, where they are another's as well.
        """
        started = time.perf_counter()
        limit_torch_threads(config.trunk.threads or 1)
        checkpoint = Checkpoint.open(resolve_model(config))
        draft = open_draft(config, checkpoint.directory)
        made: list[ExpertDispatcher] = []
        computes: list[Compute] = []

        def make_experts(compute: Compute) -> ExpertDispatcher:
            computes.append(compute)
            _keep_to_budget(config, checkpoint, compute, deployment)
            if experts:
                made.append(_remote_experts(config, compute, checkpoint.config, experts, numbers))
            else:
                made.append(
                    local_experts(
                        checkpoint,
                        compute,
                        lambda e: reporter(f"Expert{e}"),
                        config.experts.quantize_of,
                        resolve_adapter,
                        config.experts.offload_bytes_of,
                    )
                )
            return made[0]

        vocabulary = partial(token_bytes_of, checkpoint.directory)
        engine = build_engine(
            config, checkpoint, make_experts, reporter(deployment), vocabulary, draft, resolve_adapter
        )
        checkpoint.close()
        node_id = ray.get_runtime_context().get_node_id()
        place = TrunkPlace(replica_id, node_id, ray.util.get_node_ip_address())
        self._computing = {
            "device": computes[0].device,
            "kernels": computes[0].backend.kernels or computes[0].backend.trunk,
            "format": config.trunk.quantize or computes[0].dtype,
        }
        self._bytes_read = checkpoint.bytes_read
        self._model = config.served_name
        self._drain_s = config.trunk.drain_s
        self._runtime = TrunkRuntime(
            engine,
            made[0],
            place,
            link_options(config),
            affinity=config.trunk.affinity,
            tracing=open_tracing(config.tracing, deployment),
        )
        self.info = self._runtime.info
        # Serve takes this trunk for running once it is made, and sends requests (or a whole rollout) its way.
        if away := self._runtime.wait_complete(config.experts.deadline_s):
            logger.warning("%s: goes on without experts %s for now", deployment, ", ".join(map(str, away)))
        logger.info(
            "%s: read %d bytes (shared tensors%s) in %.1f s; KV cache %d tokens, %.2f x %d; listening on %s",
            deployment,
            checkpoint.bytes_read,
            "" if experts else " and all experts",
            time.perf_counter() - started,
            self.info.kv_cache_tokens,
            self.info.kv_cache_tokens / self.info.max_model_len,
            self.info.max_model_len,
            self.info.address,
        )
        metrics = TrunkMetrics(replica_id, self._runtime.stats, self._runtime.call_counters)
        as_vllm = EngineMetrics(config.served_name, self._runtime.stats)
        self._reporter = Reporter(metrics.report, as_vllm.report)

    def status(self) -> dict[str, Any]:
        """Memory and load, and what this trunk computes with."""
        told = {"model": self._model, "bytes_read": self._bytes_read}
        return {**told, **self._computing, **self._runtime.status()}

    @property
    def failure(self) -> BaseException | None:
        """Why the engine stopped; None while it runs."""
        return self._runtime.failure

    def load(self) -> dict[str, float]:
        """What the scaling policy goes by: requests running and waiting, the share of KV blocks that they hold."""
        stats = self._runtime.stats()
        kv_use = 1 - stats.kv_blocks_free / max(stats.kv_blocks_total, 1)
        return {RUNNING: stats.num_running, WAITING: stats.num_waiting, KV_USE: kv_use}

    def close(self) -> None:
        """Let running requests end for at most `trunk.drain_s`, then end everything. Idempotent."""
        self._runtime.close(self._drain_s)
        self._reporter.close()


def _keep_to_budget(config: Config, checkpoint: Checkpoint, compute: Compute, deployment: str) -> None:
    """Limit what this process takes of its card. Raises `OverBudget` where the trunk's weights alone take more."""
    if config.trunk.gpu_memory_gib is None:
        return
    budget = int(config.trunk.gpu_memory_gib * GIB)
    limit_card_memory(budget, compute.device)
    stored = {weight: checkpoint.find(weight) for weight in weights_of_trunk(checkpoint.config)}
    kept = WeightsHeld.kept(stored, compute.backend.trunk == "triton")
    held = WeightsHeld(HeldAs(compute.dtype, config.trunk.quantize), stored=kept)
    check_budget(deployment, sum(map(held.nbytes, stored)), budget)


def _remote_experts(
    config: Config,
    compute: Compute,
    model: ModelConfig,
    handles: Sequence[DeploymentHandle],
    numbers: ExpertNumbers | None,
) -> ExpertDispatcher:
    options = link_options(config)
    if config.experts.card_mailboxes:
        from moe_ray.transport.mailbox.open_card import card_mailboxes

        options = replace(options, mailboxes=card_mailboxes(compute.device))
    carriers = CARRIERS if config.transport == "auto" else (config.transport,)
    discovery = ExpertDiscovery(handles)
    table = ReplicaTable(
        discovery.ask if numbers is None else lambda: numbers.told(discovery.ask()),
        lambda info: connect(best_carrier(info, carriers), info, options),
        model.expert_keys,
        config.experts.refresh_s,
        discovery.members,
    )
    table.start()
    return ExpertDispatcher(
        table,
        DispatchOptions(
            deadline_s=config.experts.deadline_s,
            call_timeout_s=config.experts.call_timeout_s,
            on_loss=config.experts.on_expert_loss,
            card_rows=options.mailboxes is not None,
            numbers=numbers,
            node_id=ray.get_runtime_context().get_node_id(),
        ),
        discovery,
    )
