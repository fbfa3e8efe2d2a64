"""A model pulled apart in this process: its experts behind real servers of one carrier, in replicas that may go."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared_device import SharedDevice

from moe_ray.config import load_config
from moe_ray.core import ReplicaInfo
from moe_ray.engine.build import build_engine
from moe_ray.engine.engine import Engine
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.local import local_experts
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute, open_compute
from moe_ray.model.compute.resolve import Wanted
from moe_ray.model.expert_reader import read_experts
from moe_ray.model.lora.adapter_file import read_adapter
from moe_ray.model.model_config import ModelConfig
from moe_ray.transport import connect
from moe_ray.transport.base import MAILBOX_ADDRESS, ExpertHandler, ExpertServer, LinkOptions
from moe_ray.transport.mailbox.expert_end import MailboxExpertServer
from moe_ray.transport.mailbox.trunk_end import CardMailboxes

WAIT_S = 30


@dataclass(frozen=True)
class Placement:
    """Where the experts are."""

    carrier: str | None = None
    """None: no server, the experts are the trunk's own."""
    homes: tuple[tuple[int, ...], ...] = ((0,),)
    """Of each expert, in turn, which replicas hold it."""
    native: bool = True
    """Whether the two ends of a socket are the native ones."""
    card: bool = False
    """Whether trunk and replicas are on one card, and rows over sockets go through its memory."""

    def replicas(self, experts: int) -> dict[int, list[int]]:
        """Replica → the experts that it holds."""
        held: dict[int, list[int]] = {}
        for expert in range(experts):
            for home in self.homes[expert % len(self.homes)]:
                held.setdefault(home, []).append(expert)
        return held


class Spread:
    """An engine over such experts. `close` it."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], placement: Placement) -> None:
        """`settings`: of the configuration, `experts.quantize` among them."""
        self._config = load_config({**settings, "model": {"path": str(directory), **settings["model"]}})
        self._placement = placement
        self._servers: dict[str, list[ExpertServer]] = {}
        self.devices = [SharedDevice(late_s=0.0002)] if placement.card else []
        """The card, as the trunk and each replica see it."""
        self._workers: dict[str, ExpertWorker] = {}
        self._infos: dict[str, ReplicaInfo] = {}
        self._faults: dict[int, str] = {}
        checkpoint = Checkpoint.open(directory)
        self._model: ModelConfig = checkpoint.config
        self._dispatcher: ExpertDispatcher
        self.engine: Engine = build_engine(self._config, checkpoint, lambda own: self._experts(checkpoint, own))
        checkpoint.close()

    def lose(self, number: int) -> None:
        """Close one replica, and every connection with it, whatever it computes."""
        name = f"replica-{number}"
        self._infos.pop(name)
        for server in self._servers.pop(name):
            server.close()

    def close(self) -> None:
        self.engine.close()
        self._dispatcher.close()
        for server in itertools.chain.from_iterable(self._servers.values()):
            server.close()

    def want(self, wanted: Mapping[int, str]) -> None:
        """`AdapterAsker`: every replica loads at once."""
        for name, info in list(self._infos.items()):
            worker = self._workers[name]
            for adapter_id in info.adapters - wanted.keys():
                worker.remove_adapter(adapter_id)
            for adapter_id in wanted.keys() - info.adapters:
                worker.add_adapter(read_adapter(Path(wanted[adapter_id]), self._model))
            self._infos[name] = replace(info, adapters=frozenset(wanted))

    def lost(self, replica_id: str, adapters: Collection[int]) -> None:
        """They lose none."""

    def _experts(self, checkpoint: Checkpoint, own: Compute) -> ExpertDispatcher:
        quantize = self._config.experts.quantize
        if self._placement.carrier is None:
            self._dispatcher = local_experts(checkpoint, own, quantize=lambda _: quantize)
            return self._dispatcher
        for number, experts in self._placement.replicas(self._model.num_local_experts).items():
            self._start(f"replica-{number}", checkpoint, experts, quantize)
        links = self._links()
        if self._placement.card:
            links = replace(links, mailboxes=CardMailboxes(self.devices[0]))
        table = ReplicaTable(
            lambda: list(self._infos.values()),
            lambda info: connect(self._placement.carrier or "", info, links),
            self._model.expert_keys,
            refresh_s=0.05,
        )
        table.start()
        self._dispatcher = ExpertDispatcher(
            table, DispatchOptions(deadline_s=WAIT_S, card_rows=self._placement.card), self
        )
        deadline = time.monotonic() + WAIT_S
        while self._dispatcher.missing() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not self._dispatcher.missing()
        return self._dispatcher

    def _links(self) -> LinkOptions:
        return LinkOptions(token="secret", native_dir=self._config.cache_dir if self._placement.native else None)

    def _start(self, name: str, checkpoint: Checkpoint, experts: Sequence[int], quantize: str | None) -> None:
        compute = open_compute(self._model, Wanted.of(self._config.model, quantize), self._config.cache_dir, 1)
        keys = frozenset((layer, expert) for layer in range(self._model.num_hidden_layers) for expert in experts)
        ffn, links = read_experts(checkpoint, keys, compute, quantize=quantize), self._links()
        worker = ExpertWorker(ffn, self._model.hidden_size, compute, native_dir=links.native_dir)
        server = _serve(self._placement.carrier or "", worker, links)
        self._workers[name], self._servers[name] = worker, [server]
        addresses = {self._placement.carrier or "": server.address}
        if self._placement.card:
            self.devices.append(SharedDevice(late_s=0.0002))
            by_card = MailboxExpertServer(worker.forward, self.devices[-1], links)
            self._servers[name].append(by_card)
            addresses[MAILBOX_ADDRESS] = by_card.address
        self._infos[name] = ReplicaInfo(name, "here", 1, keys, self._model.hidden_size, compute.dtype, addresses)


def _serve(carrier: str, worker: ExpertWorker, links: LinkOptions) -> ExpertServer:
    handler: ExpertHandler = worker.forward
    if carrier == "socket":
        from moe_ray.transport.socket import SocketExpertServer

        return SocketExpertServer(handler, options=links, native=worker.native)
    if carrier == "grpc":
        from moe_ray.transport.grpc import GrpcExpertServer

        return GrpcExpertServer(handler, options=links)
    from moe_ray.transport.local import LocalExpertServer

    made: Callable[[ExpertHandler], ExpertServer] = LocalExpertServer
    return made(handler)
