"""Experts whose computing is emulated behind the real worker, which computes together what waits together."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from moe_ray.bench.child import Parent, answer_commands
from moe_ray.bench.lab.emulate import ServiceTime
from moe_ray.bench.lab.skew_process import sleep_until
from moe_ray.core import AdapterRows, ReplicaInfo
from moe_ray.experts.replica_data import packed
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.expert import ExpertFFN
from moe_ray.model.lora.parts import ExpertPart
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.socket import SocketExpertServer

if TYPE_CHECKING:
    import torch


class EmulatedFFN:
    """`model.expert.FFN` that takes the time of `service` for all rows that it is given at once."""

    nbytes = 0

    def __init__(self, service: ServiceTime) -> None:
        self._service = service

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        done = time.perf_counter() + self._service.seconds(rows.shape[0])
        out = rows * weights[:, None]
        sleep_until(done)
        return out

    def entry(self) -> None:
        """None: computed through the interpreter."""
        return

    def buffers(self) -> list[memoryview]:
        return []

    adapter_bytes = 0

    def add_adapter(self, adapter_id: int, part: ExpertPart) -> None:
        """Nothing is added: its weights are none."""

    def remove_adapter(self, adapter_id: int) -> None:
        """Nothing."""

    def has_adapter(self, adapter_id: int) -> bool:
        return False

    def adapter_handle(self, adapter_id: int) -> None:
        """None: computed through the interpreter."""


def main() -> None:
    """Answer `start`, `stop` and `counts`."""
    import torch

    torch.set_num_threads(1)
    sys.setswitchinterval(0.0005)  # whoever spins must not keep the others from waking
    running = dict[str, tuple[ExpertWorker, SocketExpertServer]]()
    compute = Compute(Backend("float32"))

    def start(
        name: str,
        expert: int,
        layers: int,
        token: str,
        service: list[float],
        hidden: int,
        max_batched_rows: int,
        **_: float,
    ) -> dict[str, Any]:
        keys = frozenset((layer, expert) for layer in range(layers))
        ffns = ExpertFFN(dict.fromkeys(keys, EmulatedFFN(ServiceTime(*service))))
        worker = ExpertWorker(ffns, hidden, compute, max_batched_rows=max_batched_rows)
        server = SocketExpertServer(worker.forward, options=LinkOptions(token=token))
        running[name] = worker, server
        return packed(ReplicaInfo(name, "local", os.getpid(), keys, hidden, "float32", {"socket": server.address}))

    def stop(names: list[str]) -> dict[str, Any]:
        for name in names:
            running.pop(name)[1].close()
        return {}

    def counts() -> dict[str, Any]:
        stats = [worker.stats() for worker, _ in running.values()]
        return {key: sum(getattr(each, key) for each in stats) for key in ("calls", "batches", "rows", "busy_s")}

    answer_commands(Parent(), {"start": start, "stop": stop, "counts": counts})


if __name__ == "__main__":
    main()
