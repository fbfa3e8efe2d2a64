"""All experts in this process: what `LLM` and `--transport local` use."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from moe_ray.core import ExpertCall, ReplicaInfo
from moe_ray.errors import AdapterError
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.server.expert_memory import ExpertMemory
from moe_ray.experts.server.offload import CardBuffers, Offload
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.compute.compute import Compute
from moe_ray.model.expert import ExpertFFN
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.model.lora.adapter_file import read_adapter
from moe_ray.model.model_config import ModelConfig
from moe_ray.transport.base import ExpertHandler
from moe_ray.transport.local import LocalLink, LocalPending


def local_experts(
    checkpoint: Checkpoint,
    compute: Compute,
    progress: Callable[[int], Progress] | None = None,
    quantize: Callable[[int], str | None] = lambda _: None,
    locate_adapter: Callable[[str], Path] = Path,
    offload_bytes: Callable[[int], int] = lambda _: 0,
) -> ExpertDispatcher:
    """Load every expert of `checkpoint` into this process and return a pool over them. Raises `CheckpointError`.

    `progress(expert)` gives the progress callback of one expert, `quantize(expert)` what its weights are quantised to,
    `locate_adapter(source)` the directory of an adapter, `offload_bytes(expert)` how much of it stays in the host's
    memory at least; all experts share the buffers on the card. Raises `ConfigError` where an offload is asked for and
    cannot be had.
    """
    config = checkpoint.config
    offloaded = [expert for expert in range(config.num_local_experts) if offload_bytes(expert)]
    buffers = CardBuffers(compute, len(offloaded))
    workers: dict[str, ExpertWorker] = {}
    infos: list[ReplicaInfo] = []
    for expert in range(config.num_local_experts):
        keys = frozenset((layer, expert) for layer in config.mixture_layers)
        bar = progress(expert) if progress else None
        reader = ExpertReader(checkpoint, keys, compute, bar, quantize(expert))
        memory = ExpertMemory(offload_bytes=offload_bytes(expert))
        offload = Offload(f"Expert{expert}", reader.keys, memory, compute, buffers)
        ffn = ExpertFFN({key: offload.settle(key, reader.read(key)) for key in reader.keys})
        replica_id = f"Expert{expert}#local"
        workers[replica_id] = ExpertWorker(ffn, config.hidden_size, compute, waits=False)
        infos.append(
            ReplicaInfo(
                replica_id=replica_id,
                node_id="local",
                pid=os.getpid(),
                keys=keys,
                hidden_size=config.hidden_size,
                dtype=compute.dtype,
                addresses={"local": replica_id},
            )
        )
    adapters = _LocalAdapters(config, workers.values(), locate_adapter)
    table = ReplicaTable(
        lambda: [adapters.known_to(info) for info in infos],
        lambda info: _TellingLink(info, workers[info.replica_id].forward, buffers),
        config.expert_keys,
    )
    table.refresh()  # nothing here changes by itself, so no thread is started
    return ExpertDispatcher(table, DispatchOptions(in_process=True), adapters)


class _TellingLink(LocalLink):
    """Tells which layers will be called: all calls of a layer are sent before the first is computed."""

    def __init__(self, info: ReplicaInfo, handler: ExpertHandler, buffers: CardBuffers) -> None:
        super().__init__(info, handler)
        self._buffers = buffers

    def send(self, call: ExpertCall) -> LocalPending:
        pending = super().send(call)
        self._buffers.expect((call.layer, call.expert))
        return pending


class _LocalAdapters:
    """`adapter_table.AdapterAsker` of the experts in this process: they load at once."""

    def __init__(self, config: ModelConfig, workers: Collection[ExpertWorker], locate: Callable[[str], Path]) -> None:
        self._config, self._workers, self._locate = config, workers, locate
        self._held: frozenset[int] = frozenset()
        self._faults: dict[int, str] = {}

    def known_to(self, info: ReplicaInfo) -> ReplicaInfo:
        """A replica with the adapters that it holds by now."""
        return replace(info, adapters=self._held, adapter_faults=dict(self._faults))

    def want(self, wanted: Mapping[int, str]) -> None:
        for adapter_id in self._held - wanted.keys():
            self._held -= {adapter_id}
            for worker in self._workers:
                worker.remove_adapter(adapter_id)
        self._faults = {}
        for adapter_id, source in wanted.items():
            if adapter_id in self._held:
                continue
            try:
                adapter = read_adapter(self._locate(source), self._config)
                for worker in self._workers:
                    worker.add_adapter(adapter)
            except AdapterError as error:
                self._faults[adapter_id] = str(error)
            else:
                self._held |= {adapter_id}

    def lost(self, replica_id: str, adapters: Collection[int]) -> None:
        """They lose none."""
