"""The Serve deployment of a trunk: the engine, its links to the experts, and a port for gateways."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import psutil
import ray
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from moe_ray import telemetry
from moe_ray.config import Config
from moe_ray.core import TrunkInfo
from moe_ray.engine.build import Numerics, build_engine
from moe_ray.engine.loop import EngineLoop
from moe_ray.errors import EngineError
from moe_ray.experts.discovery import Directory
from moe_ray.experts.local import local_pool, model_keys
from moe_ray.experts.pool import ExpertPool, PoolOptions
from moe_ray.hub import resolve_model
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.model_config import ModelConfig
from moe_ray.serve.discovery import discover_experts
from moe_ray.serve.links import link_options
from moe_ray.serve.progress import reporter
from moe_ray.serve.trunk_server import TrunkServer
from moe_ray.transport import CARRIERS, best_carrier, connect

logger = logging.getLogger(__name__)


class TrunkReplica:
    """One actor holding the shared layers and the KV cache."""

    def __init__(self, config: Config, experts: Sequence[DeploymentHandle]) -> None:
        """Load, link and listen. `experts` is empty for `transport: local`. Raises `CheckpointError`, `ConfigError`."""
        telemetry.configure(config.log_level)
        started, context = time.perf_counter(), serve.get_replica_context()
        torch.set_num_threads(config.trunk.threads or 1)
        checkpoint = Checkpoint.open(resolve_model(config))

        def make_experts(how: Numerics) -> ExpertPool:
            if not experts:
                return local_pool(checkpoint, how.dtype, how.device, lambda e: reporter(f"Expert{e}"), how.kernels)
            return _remote_pool(config, checkpoint.config, experts)

        pools: list[ExpertPool] = []

        def keep(how: Numerics) -> ExpertPool:
            pools.append(make_experts(how))
            return pools[0]

        engine = build_engine(config, checkpoint, keep, reporter(context.deployment))
        checkpoint.close()
        (self._pool,) = pools
        self._bytes_read, self._kv_bytes = checkpoint.bytes_read, engine.kv_cache_bytes
        self._loop = EngineLoop(engine)
        self._server = TrunkServer(self._loop, self._pool.missing, ray.util.get_node_ip_address(), link_options(config))
        options = engine.options
        self._info = TrunkInfo(
            replica_id=context.replica_id.to_full_id_str(),
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            address=self._server.address,
            max_model_len=options.max_model_len,
            kv_cache_tokens=options.num_blocks * options.block_size,
        )
        logger.info(
            "%s: read %d bytes (shared tensors%s) in %.1f s; KV cache %d tokens, %.2f x %d; listening on %s",
            context.deployment,
            checkpoint.bytes_read,
            "" if experts else " and all experts",
            time.perf_counter() - started,
            self._info.kv_cache_tokens,
            self._info.kv_cache_tokens / options.max_model_len,
            options.max_model_len,
            self._info.address,
        )

    async def endpoint(self) -> TrunkInfo:
        """Who this trunk is and where it listens."""
        return self._info

    async def status(self) -> dict[str, Any]:
        """Place, memory and load of this process."""
        return {
            **telemetry.process_status(psutil.Process()),
            "replica_id": self._info.replica_id,
            "node_id": self._info.node_id,
            "addresses": {"grpc": self._info.address},
            "bytes_read": self._bytes_read,
            "kv_cache_bytes": self._kv_bytes,
            "kv_cache_tokens": self._info.kv_cache_tokens,
            "max_model_len": self._info.max_model_len,
            "missing": [f"Expert{e}" for e in self._pool.missing()],
            "retries": self._pool.retries,
            "links": {r.info.replica_id: r.calls for r in self._pool.replicas()},
            **asdict(self._loop.stats()),
        }

    def check_health(self) -> None:
        """Raise when the engine has stopped, so that Serve replaces this replica."""
        if self._loop.failure is not None:
            raise EngineError(f"the engine stopped: {self._loop.failure!r}")

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.close()  # first: gateways replay elsewhere what was running, and see no error
            self._loop.close()
            self._pool.close()


def _remote_pool(config: Config, model: ModelConfig, handles: Sequence[DeploymentHandle]) -> ExpertPool:
    keys = model_keys(model.num_hidden_layers, model.num_local_experts)
    options = link_options(config)
    carriers = CARRIERS if config.transport == "auto" else (config.transport,)
    directory = Directory(
        discover_experts(handles),
        lambda info: connect(best_carrier(info, carriers), info, options),
        keys,
        config.experts.refresh_s,
    )
    directory.start()
    return ExpertPool(
        directory, PoolOptions(deadline_s=config.experts.deadline_s, call_timeout_s=config.experts.call_timeout_s)
    )
