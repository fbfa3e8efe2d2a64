"""All experts in this process: what `LLM` and `--transport local` use."""

from __future__ import annotations

import os
from collections.abc import Callable

from moe_ray.core import ReplicaInfo
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.compute.compute import Compute
from moe_ray.model.expert_reader import read_experts
from moe_ray.transport.local import LocalLink


def model_keys(num_layers: int, num_experts: int) -> frozenset[tuple[int, int]]:
    """Every (layer, expert) of a model."""
    return frozenset((layer, expert) for layer in range(num_layers) for expert in range(num_experts))


def local_experts(
    checkpoint: Checkpoint,
    compute: Compute,
    progress: Callable[[int], Progress] | None = None,
    quantize: Callable[[int], str | None] = lambda _: None,
) -> ExpertDispatcher:
    """Load every expert of `checkpoint` into this process and return a pool over them. Raises `CheckpointError`.

    `progress(expert)` gives the progress callback of one expert, `quantize(expert)` what its weights are quantised to.
    """
    config = checkpoint.config
    workers: dict[str, ExpertWorker] = {}
    infos = []
    for expert in range(config.num_local_experts):
        keys = frozenset((layer, expert) for layer in range(config.num_hidden_layers))
        bar = progress(expert) if progress else None
        ffn = read_experts(checkpoint, keys, compute, bar, quantize(expert))
        replica_id = f"Expert{expert}#local"
        workers[replica_id] = ExpertWorker(ffn, config.hidden_size, compute)
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
    keys = model_keys(config.num_hidden_layers, config.num_local_experts)
    table = ReplicaTable(lambda: infos, lambda info: LocalLink(info, workers[info.replica_id].forward), keys)
    table.refresh()  # nothing here changes, so no thread is started
    return ExpertDispatcher(table, DispatchOptions(in_process=True))
