"""The Serve deployment of one expert: loads its tensors, opens its ports, says who it is."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict
from typing import Any

import psutil
import ray
from ray import serve

from moe_ray import telemetry
from moe_ray.config import Config
from moe_ray.core import ReplicaInfo
from moe_ray.engine.numerics import numerics
from moe_ray.experts.load import WINDOW_S, LoadSampler
from moe_ray.experts.worker import ExpertWorker
from moe_ray.hub import resolve_model
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.expert import ExpertFFN
from moe_ray.model.numerics import limit_torch_threads
from moe_ray.serve.links import link_options
from moe_ray.serve.metrics import ExpertMetrics
from moe_ray.serve.progress import reporter
from moe_ray.serve.scaling import BUSY, QUEUED, wait_until_quiet
from moe_ray.transport.base import ExpertServer

logger = logging.getLogger(__name__)


class ExpertReplica:
    """One actor holding one expert over all layers."""

    def __init__(self, config: Config, expert: int) -> None:
        """Load and listen. Raises `CheckpointError`, `ConfigError`."""
        telemetry.configure(config.log_level)
        started, name = time.perf_counter(), serve.get_replica_context().deployment
        threads = config.experts.of(expert).threads or 1
        limit_torch_threads(threads)
        checkpoint = Checkpoint.open(resolve_model(config))
        model = checkpoint.config
        how = numerics(config, model, threads)
        keys = frozenset((layer, expert) for layer in range(model.num_hidden_layers))
        ffn = ExpertFFN.load(checkpoint, keys, how, reporter(name))
        checkpoint.close()
        self._worker = ExpertWorker(ffn, model.hidden_size, how)
        self._servers = self._listen(config)
        self._linger_s = config.experts.refresh_s + 1
        context = ray.get_runtime_context()
        self._info = ReplicaInfo(
            replica_id=serve.get_replica_context().replica_id.to_full_id_str(),
            node_id=context.get_node_id(),
            pid=os.getpid(),
            keys=keys,
            hidden_size=model.hidden_size,
            dtype=how.dtype,
            addresses={carrier: server.address for carrier, server in self._servers.items()},
        )
        logger.info(
            "%s: read %d bytes (its own tensors only) in %.1f s, %s on %s, listening on %s",
            name,
            checkpoint.bytes_read,
            time.perf_counter() - started,
            self._info.dtype,
            how.device,
            ", ".join(f"{carrier} {address}" for carrier, address in self._info.addresses.items()),
        )
        self._bytes_read = checkpoint.bytes_read
        metrics = ExpertMetrics(expert, self._info.replica_id, self._worker.stats)
        self._sampler = LoadSampler(self._worker.key_loads, metrics.report)
        self._sampler.start()

    def _listen(self, config: Config) -> dict[str, ExpertServer]:
        servers: dict[str, ExpertServer] = {}
        host, options = ray.util.get_node_ip_address(), link_options(config)
        if config.transport in ("auto", "socket"):
            from moe_ray.transport.socket import SocketExpertServer

            servers["socket"] = SocketExpertServer(
                self._worker.forward, host, options=options, native=self._worker.native
            )
        if config.transport in ("auto", "grpc"):
            from moe_ray.transport.grpc import GrpcExpertServer

            servers["grpc"] = GrpcExpertServer(self._worker.forward, host, options=options)
        if config.transport in ("auto", "ray"):
            from moe_ray.transport.ray import RayExpertServer

            servers["ray"] = RayExpertServer(self._worker.forward)
        return servers

    async def endpoint(self) -> ReplicaInfo:
        """Who this replica is and where it listens."""
        return self._info

    async def load(self) -> dict[str, Any]:
        """Place of this process and its load in the last seconds; cheap enough to be polled."""
        stats = self._worker.stats()
        return {
            "replica_id": self._info.replica_id,
            "node_id": self._info.node_id,
            "pid": self._info.pid,
            "weight_bytes": stats.weight_bytes,
            "calls": stats.calls,
            "batches": stats.batches,
            "rows": stats.rows,
            "busy_s": stats.busy_s,
            "queue_s": stats.queue_s,
            "queued_rows": stats.queued_rows,
            "load": asdict(self._sampler.window(WINDOW_S)),
        }

    async def status(self) -> dict[str, Any]:
        """Place, memory and load of this process."""
        return {
            **telemetry.process_status(psutil.Process()),
            **await self.load(),
            "addresses": dict(self._info.addresses),
            "bytes_read": self._bytes_read,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to the scaling policy."""
        stats = self._worker.stats()
        return {BUSY: stats.busy_s, QUEUED: stats.queued_rows}

    def __del__(self) -> None:
        if getattr(self, "_servers", None):
            wait_until_quiet(lambda: self._worker.stats().calls, self._linger_s)
        if hasattr(self, "_sampler"):
            self._sampler.close()
        for server in getattr(self, "_servers", {}).values():
            server.close()
