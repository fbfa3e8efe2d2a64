"""One expert in a process or Ray actor of its own: the tensors, worker and servers of a served one, without Serve."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_ray.bench.card import memory_of_this_process
from moe_ray.bench.child import Parent, answer_commands
from moe_ray.config import Config
from moe_ray.core import ReplicaInfo
from moe_ray.experts.replica_data import packed
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.compute.compute import limit_torch_threads, open_compute
from moe_ray.model.compute.resolve import Wanted
from moe_ray.model.expert_reader import read_experts
from moe_ray.transport.base import MAILBOX_ADDRESS, ExpertServer, LinkOptions


class ExpertHost:
    """A loaded expert, and the ports that it listens on."""

    def __init__(self, config: dict[str, Any], directory: str, expert: int, progress: Progress | None = None) -> None:
        """Load every layer of `expert`. Raises `CheckpointError`, `ConfigError`."""
        settings = Config(**config)
        threads = settings.experts.threads or 1
        limit_torch_threads(threads)
        checkpoint = Checkpoint.open(Path(directory))
        model = checkpoint.config
        quantize = settings.experts.of(expert).quantize
        compute = open_compute(model, Wanted.of(settings.model, quantize), settings.cache_dir, threads)
        self._keys = frozenset((layer, expert) for layer in model.mixture_layers)
        ffn = read_experts(checkpoint, self._keys, compute, progress, quantize)
        checkpoint.close()
        self._worker = ExpertWorker(ffn, model.hidden_size, compute, native_dir=settings.cache_dir)
        self._name, self._hidden_size, self._dtype = f"Expert{expert}", model.hidden_size, compute.dtype
        self._servers: dict[str, ExpertServer] = {}

    def listen(self, carriers: Iterable[str], token: str) -> ReplicaInfo:
        """Open the carriers' servers, on loopback, and say where."""
        options = LinkOptions(token=token)
        for carrier in carriers:
            if carrier == MAILBOX_ADDRESS:
                from moe_ray.transport.mailbox.open_card import mailbox_server

                self._servers["socket"] = self._server("socket", options)
                by_card = mailbox_server(self._worker.forward, self._worker.compute.device, options)
                if by_card is not None:
                    self._servers[carrier] = by_card
            else:
                self._servers[carrier] = self._server(carrier, options)
        return ReplicaInfo(
            replica_id=self._name,
            node_id="local",
            pid=os.getpid(),
            keys=self._keys,
            hidden_size=self._hidden_size,
            dtype=self._dtype,
            addresses={carrier: server.address for carrier, server in self._servers.items()},
        )

    def close(self) -> None:
        """Stop listening."""
        for server in self._servers.values():
            server.close()

    def _server(self, carrier: str, options: LinkOptions) -> ExpertServer:
        if carrier == "socket":
            from moe_ray.transport.socket import SocketExpertServer

            return SocketExpertServer(self._worker.forward, options=options, native=self._worker.native)
        if carrier == "grpc":
            from moe_ray.transport.grpc import GrpcExpertServer

            return GrpcExpertServer(self._worker.forward, options=options)
        from moe_ray.transport.ray import RayExpertServer

        return RayExpertServer(self._worker.forward)


def main() -> None:
    """Answer `load`: load an expert, listen, and say where; and `memory`."""
    parent, hosts = Parent(), list[ExpertHost]()

    def load(expert: int, carriers: list[str], token: str, **what: Any) -> dict[str, Any]:
        name = f"Expert{expert}"
        hosts.append(ExpertHost(expert=expert, progress=lambda done, total: parent.progress(name, done, total), **what))
        return packed(hosts[-1].listen(carriers, token))

    answer_commands(parent, {"load": load, "memory": memory_of_this_process})
    for host in hosts:
        host.close()


if __name__ == "__main__":
    main()
