"""A running trunk without Ray: the engine on its thread, the experts that it calls, a port for gateways."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from moe_ray.core import EngineStats, TrunkInfo
from moe_ray.engine.engine import Engine
from moe_ray.engine.loop import EngineLoop
from moe_ray.engine.traced_step import StepTracer
from moe_ray.experts.client.accounting import Counters
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.observe.tracing import Tracing
from moe_ray.transport.base import LinkOptions
from moe_ray.trunk.server import TrunkServer
from moe_ray.trunk.traces import RequestTraces


@dataclass(frozen=True, slots=True)
class TrunkPlace:
    """Which replica a trunk is, and where it runs."""

    replica_id: str
    node_id: str
    host: str
    """The address that its port is bound to, by which gateways reach it."""


class TrunkRuntime:
    """Serves one engine to gateways until `close`."""

    def __init__(
        self,
        engine: Engine,
        experts: ExpertDispatcher,
        place: TrunkPlace,
        links: LinkOptions,
        *,
        affinity: bool,
        tracing: Tracing | None = None,
    ) -> None:
        """Start the engine's thread and listen. `experts`: those that the engine calls; closed with the runtime.

        `affinity`: gateways may choose this trunk by what its prefix cache holds. `tracing` is closed with the
        runtime; None: nothing is traced. Raises `ConfigError` when it cannot listen.
        """
        self._tracing = tracing
        traces = None if tracing is None else RequestTraces(tracing)
        if tracing is not None and traces is not None:
            engine.trace_steps(StepTracer(traces.step, tracing.options.steps_per_request))
        self._experts = experts
        self._kv_cache_bytes, self._drafting = engine.kv_cache_bytes, engine.drafting
        self._device, self._format = engine.device, ", ".join(engine.held)
        self._loop = EngineLoop(engine)
        self._server = TrunkServer(self._loop, experts.missing, place.host, links, traces)
        options = engine.options
        self.info = TrunkInfo(
            replica_id=place.replica_id,
            node_id=place.node_id,
            pid=os.getpid(),
            address=self._server.address,
            max_model_len=options.max_model_len,
            kv_cache_tokens=options.num_blocks * options.block_size,
            block_size=options.block_size if affinity and options.limits.enable_prefix_caching else 0,
        )

    @property
    def failure(self) -> BaseException | None:
        """Why the engine stopped; None while it runs."""
        return self._loop.failure

    @property
    def call_counters(self) -> Counters:
        """What the calls to experts came to since the start."""
        return self._experts.counters

    def stats(self) -> EngineStats:
        """A snapshot of the engine; from any thread."""
        return self._loop.stats()

    def wait_complete(self, timeout_s: float) -> list[int]:
        """Wait until each layer of each expert has a live replica; the experts that have none after `timeout_s`."""
        return self._experts.table.wait_complete(timeout_s)

    def status(self) -> dict[str, Any]:
        """Load, and the links to experts."""
        return {
            "addresses": {"grpc": self.info.address},
            "device": self._device,
            "format": self._format,
            "kv_cache_bytes": self._kv_cache_bytes,
            "draft_model_bytes": 0 if self._drafting is None else self._drafting.model_bytes,
            "drafts_by_kind": {} if self._drafting is None else self._drafting.told(),
            "kv_cache_tokens": self.info.kv_cache_tokens,
            "max_model_len": self.info.max_model_len,
            "missing": [f"Expert{expert}" for expert in self._experts.missing()],
            "expert_calls": asdict(self.call_counters),
            "links": {replica.replica_id: replica.calls for replica in self._experts.table.replicas()},
            **asdict(self.stats()),
        }

    def close(self, drain_s: float) -> None:
        """Let running requests end for at most `drain_s`, then end everything. Idempotent."""
        self._server.drain(drain_s)
        self._server.close()  # first: gateways replay elsewhere what still runs, and see no error
        self._loop.close()
        self._experts.close()
        if self._tracing is not None:
            self._tracing.close()
