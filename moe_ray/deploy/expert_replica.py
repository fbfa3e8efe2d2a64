"""The Serve deployment of one expert: loads its first layer, opens its ports, says who it is, loads the others."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import psutil
import ray
from ray import serve

from moe_ray import telemetry
from moe_ray.config import Config
from moe_ray.core import ReplicaInfo
from moe_ray.deploy.cards import hide_cards_of_others
from moe_ray.deploy.discovery import as_metadata
from moe_ray.deploy.link_options import link_options
from moe_ray.deploy.loading_board import reporter
from moe_ray.deploy.metrics import ExpertMetrics, surviving
from moe_ray.deploy.peers import find_peers, is_ending, wait_for_successor
from moe_ray.deploy.replica_targets import BATCHES, BUSY, CALLS, QUEUE, wait_until_quiet
from moe_ray.errors import EngineError
from moe_ray.experts.planning.placement import Holding
from moe_ray.experts.server.adapter_loader import AdapterLoader
from moe_ray.experts.server.expert_memory import NO_LIMITS, ExpertMemory
from moe_ray.experts.server.load_counters import WINDOW_S, LoadSampler, by_expert
from moe_ray.experts.server.weight_loader import CARRIER, WeightLoader
from moe_ray.hub import resolve_adapter, resolve_model
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.card_memory import limit_card_memory
from moe_ray.model.compute.compute import limit_torch_threads, open_compute
from moe_ray.model.compute.resolve import Wanted
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.transport.base import MAILBOX_ADDRESS, ExpertServer
from moe_ray.transport.weight_transfer import WeightsServer

logger = logging.getLogger(__name__)


class ExpertReplica:
    """One actor holding some keys: one expert over all layers, or whatever its deployment holds."""

    def __init__(
        self,
        config: Config,
        holding: Holding,
        threads: int,
        quantize: str | None,
        memory: ExpertMemory = NO_LIMITS,
    ) -> None:
        """Check all, load one layer, listen and load on; compute with `threads`, hold weights quantised to `quantize`.

        Raises `CheckpointError`, `ConfigError`; `OverBudget` where weights take more of the card than `memory` says.
        """
        telemetry.configure(config.log_level, config.log_format)
        hide_cards_of_others(config.model.device)
        started, name = time.perf_counter(), holding.name
        limit_torch_threads(threads)
        checkpoint = Checkpoint.open(resolve_model(config))
        model = checkpoint.config
        compute = open_compute(model, Wanted.of(config.model, quantize), config.cache_dir, threads)
        limit_card_memory(memory.budget_bytes, compute.device)
        variants = [Checkpoint.open(resolve_model(each)) for each in config.for_variants]
        reader = ExpertReader(checkpoint, holding.all_keys, compute, reporter(name), quantize, variants)
        self._computing = {
            "device": compute.device,
            "kernels": compute.backend.kernels or compute.backend.experts,
            "format": reader.layout.format,
        }
        native_dir = link_options(config).native_dir
        self._weight_loader = WeightLoader(name, reader, model.hidden_size, compute, native_dir, memory)
        self._worker = self._weight_loader.worker
        self._adapters = AdapterLoader(
            name,
            self._worker,
            model,
            resolve_adapter,
            lambda: not self._weight_loader.loading,
        )
        self._servers = self._listen(config)
        self._linger_s, self._handover_s = config.experts.refresh_s + 1, config.experts.handover_s
        context, replica = ray.get_runtime_context(), serve.get_replica_context()
        self._info = ReplicaInfo(
            replica_id=replica.replica_id.to_full_id_str(),
            node_id=context.get_node_id(),
            pid=os.getpid(),
            keys=frozenset(reader.keys),
            hidden_size=model.hidden_size,
            dtype=compute.dtype,
            addresses={carrier: server.address for carrier, server in self._servers.items()},
        )
        self._device = compute.device
        self._format = compute.dtype if reader.layout.format == "float" else reader.layout.format
        logger.info(
            "%s: serves its first layer after %.1f s, %s on %s, weights held as %s, listening on %s",
            name,
            time.perf_counter() - started,
            self._info.dtype,
            compute.device,
            reader.layout.format,
            ", ".join(f"{carrier} {address}" for carrier, address in self._info.addresses.items()),
        )
        metrics = ExpertMetrics(name, self._info.replica_id, self._worker.stats)
        self._sampler = LoadSampler(
            lambda: by_expert(self._worker.key_loads(), model.num_local_experts), surviving(metrics.report)
        )
        self._sampler.start()
        self._application = replica.app_name
        self._find_peers = find_peers(replica.deployment, replica.app_name)
        self._weight_loader.start(self._find_peers, *(self._info.replica_id, self._info.node_id, link_options(config)))

    def _listen(self, config: Config) -> dict[str, ExpertServer]:
        servers: dict[str, ExpertServer] = {}
        host, options = ray.util.get_node_ip_address(), link_options(config)
        if config.transport in ("auto", "socket"):
            from moe_ray.transport.socket import SocketExpertServer

            servers["socket"] = SocketExpertServer(
                self._worker.forward, host, options=options, native=self._worker.native
            )
            if config.experts.card_mailboxes:
                from moe_ray.transport.mailbox.open_card import mailbox_server

                by_card = mailbox_server(self._worker.forward, self._worker.compute.device, options)
                if by_card is not None:
                    servers[MAILBOX_ADDRESS] = by_card
        if config.transport in ("auto", "grpc"):
            from moe_ray.transport.grpc import GrpcExpertServer

            servers["grpc"] = GrpcExpertServer(self._worker.forward, host, options=options)
        if config.transport in ("auto", "ray"):
            from moe_ray.transport.ray import RayExpertServer

            servers["ray"] = RayExpertServer(self._worker.forward)
        if config.transport != "ray":  # which opens no ports
            servers[CARRIER] = WeightsServer(self._weight_loader.offer, host, options=options)
        return servers

    async def endpoint(self) -> ReplicaInfo:
        """Who this replica is, where it listens and what it serves by now."""
        loading = self._weight_loader.loading  # asked first: once it is False, the keys are all there
        adapters, faults = self._adapters.held, self._adapters.faults
        return replace(self._info, keys=self._worker.keys, loading=loading, adapters=adapters, adapter_faults=faults)

    async def hold_adapters(self, wanted: Mapping[int, str], unwanted: Sequence[int]) -> ReplicaInfo:
        """`endpoint`; what is wanted of adapters (id → source) and not here is loaded, the unwanted is forgotten."""
        self._adapters.ask(wanted, unwanted)
        return await self.endpoint()

    async def record_replica_metadata(self) -> dict[str, Any]:
        """What Serve pushes to trunks once this replica is ready, so that they link to it without asking."""
        return as_metadata(await self.endpoint())

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
            "device": self._device,
            "format": self._format,
            "loaded_keys": len(self._worker.keys),
            "keys": self._weight_loader.num_keys,
            "load": asdict(self._sampler.window(WINDOW_S)),
        }

    async def status(self) -> dict[str, Any]:
        """Place, memory and load of this process."""
        return {
            **telemetry.process_status(psutil.Process()),
            **await self.load(),
            **self._computing,
            "addresses": dict(self._info.addresses),
            "bytes_read": self._weight_loader.bytes_read,
            "bytes_from_peers": self._weight_loader.bytes_from_peers,
        }

    def check_health(self) -> None:
        """Raise when loading has failed, so that Serve replaces this replica."""
        if self._weight_loader.failure is not None:
            raise EngineError(f"loading failed: {self._weight_loader.failure!r}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to the scaling policy."""
        stats = self._worker.stats()
        return {BUSY: stats.busy_s, QUEUE: stats.queue_s, CALLS: stats.calls, BATCHES: stats.batches}

    def __del__(self) -> None:
        if hasattr(self, "_weight_loader"):
            self._weight_loader.stop()
        if hasattr(self, "_find_peers"):
            mine = self._info.replica_id
            wait_for_successor(self._find_peers, lambda: is_ending(self._application), mine, self._handover_s)
            wait_until_quiet(lambda: self._worker.stats().calls, self._linger_s)
        if hasattr(self, "_adapters"):
            self._adapters.close()
        if hasattr(self, "_sampler"):
            self._sampler.close()
        for server in getattr(self, "_servers", {}).values():
            server.close()
        if hasattr(self, "_weight_loader"):
            self._weight_loader.close()
