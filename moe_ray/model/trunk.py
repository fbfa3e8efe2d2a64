"""The trunk: embeddings, attention, norms, router and head. The experts are injected and may live anywhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence

import torch

from moe_ray.core import Batch
from moe_ray.errors import ConfigError
from moe_ray.model import moe
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.compute.base import KVCacheView, TrunkCompute
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.native.trunk import NativeTrunk
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.lora.adapter_file import Adapter
from moe_ray.model.trunk_weights import TrunkWeights
from moe_ray.timings import LayerTimes

logger = logging.getLogger(__name__)

ForwardSteps = Generator[None, None, torch.Tensor]
"""A forward pass that yields wherever it would wait for experts and returns the logits."""


class Trunk:
    """The shared part of a model, in evaluation mode. Used by one thread at a time."""

    def __init__(
        self,
        weights: TrunkWeights,
        experts: moe.Experts,
        max_model_len: int,
        compute: Compute,
        quantize: str | None = None,
    ) -> None:
        """Read the weights in the form that the backend of `compute` wants. Raises `CheckpointError`.

        `quantize`: hold attention's matrices and the head in fewer bits, a name of `held.GROUPINGS`. Raises
        `ConfigError` where they are to be quantised and torch computes.
        """
        self.config, self.dtype, self.device = weights.config, weights.dtype, weights.device
        self._experts = experts
        self.waited_s = 0.0
        """Time that passes have waited for their experts, in all."""
        self.own_threads = compute.backend.trunk == "native"
        """Whether the kernels bring threads of their own, beside torch's."""
        self.held: tuple[str, ...] = (compute.dtype,)
        """What the matrices are held as, in words."""
        self._compute: TrunkCompute
        self._staging = compute.staging
        self._compiles = compute.backend.trunk == "triton" and compute.device == "cuda"
        self._max_model_len = max_model_len
        if compute.backend.trunk == "native":
            assert compute.kernels is not None, "a native backend is opened with its kernels"
            native = NativeTrunk(weights, max_model_len, compute.kernels, compute.dtype, quantize)
            self.held = tuple(native.held)
            logger.info("Trunk: weights held as %s", ", ".join(self.held))
            self._compute = native
        elif compute.backend.trunk == "triton":
            from moe_ray.model.compute.triton.ops import TritonOps

            ops = TritonOps(weights.config, weights.device, quantize=quantize)
            self._compute = TorchTrunk(weights, max_model_len, ops=ops, recorder=compute.recorder)
            self.held = tuple(ops.held)
            logger.info("Trunk: weights held as %s", ", ".join(self.held))
        elif quantize is not None:
            raise ConfigError(f"trunk.quantize is {quantize!r}, but torch computes the trunk of this process")
        else:
            self._compute = TorchTrunk(weights, max_model_len, recorder=compute.recorder)

    @staticmethod
    def load(
        checkpoint: Checkpoint,
        experts: moe.Experts,
        compute: Compute,
        max_model_len: int,
        progress: Progress | None = None,
        quantize: str | None = None,
    ) -> Trunk:
        """Read the trunk's own tensors only. `quantize`: see `__init__`. Raises `CheckpointError`."""
        weights = TrunkWeights(checkpoint, compute.torch_dtype, compute.torch_device, progress)
        return Trunk(weights, experts, max_model_len, compute, quantize)

    @property
    def nbytes(self) -> int:
        """Bytes of weights held in memory."""
        return self._compute.nbytes

    @property
    def adapter_bytes(self) -> int:
        """Bytes of what adapters add, in memory."""
        return self._compute.adapter_bytes

    @property
    def adapter_ids(self) -> frozenset[int]:
        """Of the adapters that are held."""
        return self._compute.adapter_ids

    def add_adapter(self, adapter: Adapter) -> None:
        """Read and hold what an adapter adds to the trunk, for batches to name it; not while a pass is under way.

        Its experts' parts are added where the experts are. Raises `AdapterError`.
        """
        self._compute.add_adapter(adapter)

    def remove_adapter(self, adapter_id: int) -> None:
        """Hold it no more; not while a pass is under way. Idempotent."""
        self._compute.remove_adapter(adapter_id)

    def warm_up(self, cache: KVCacheView) -> None:
        """Have kernels compiled that are compiled when they are first launched, if this trunk has such.

        No block of the cache changes.
        """
        if self._compiles:
            from moe_ray.model.compute.triton.warm_up import warm_up

            warm_up(self._compute, self.config.num_hidden_layers, cache, self._max_model_len)

    def forward(self, batch: Batch, cache: KVCacheView) -> ForwardSteps:
        """Run one batch; a generator that yields where it waits for experts (see `interleave`).

        Returns float32 logits [sum(num_logits), V] of the wanted positions, in order; fills `batch.degraded`
        and, where there is one, `batch.routed`.
        Raises `ExpertUnavailable` when an expert does not answer, `AdapterNotHeld` for an adapter that is not held.
        """
        work = self._compute.begin(batch, cache)
        for layer in range(self.config.num_hidden_layers):
            routed = work.route(layer)
            if routed is None:
                work.add_shared(layer)
                if batch.routed is not None:
                    batch.routed[:, layer] = 0
                continue
            routed.staging = self._staging
            begun = time.perf_counter()
            pending = self._experts.submit(layer, routed)
            sent = time.perf_counter()
            try:
                if batch.routed is not None:
                    batch.routed[:, layer] = moe.experts_of(routed)
                work.add_shared(layer)
                yield
                started = time.perf_counter()
                gathered = pending.gather()
                ended = time.perf_counter()
                self.waited_s += ended - started
                if batch.layer_times is not None:
                    rows = tuple(routed.counts)
                    batch.layer_times.append(LayerTimes(layer, rows, begun, sent, started, ended))
                work.combine(routed, gathered.rows)
                if gathered.degraded is not None:
                    batch.degraded.update(gathered.degraded.nonzero().flatten().tolist())
            finally:
                pending.abandon()  # nothing, unless this pass is being given up
        ends = zip(batch.query_start[1:], batch.num_logits, strict=True)
        return work.logits([row for end, count in ends for row in range(end - count, end)])


def interleave(passes: Sequence[ForwardSteps]) -> list[torch.Tensor]:
    """Run forward passes in turns: while one waits for its experts, the next computes. Results in order.

    Micro-batch "ping-pong" of MegaScale-Infer (arXiv:2504.02263). Whatever one of them raises ends all.
    """
    results: list[torch.Tensor | None] = [None] * len(passes)
    live = list(enumerate(passes))
    try:
        while live:
            still = []
            for i, steps in live:
                try:
                    next(steps)
                    still.append((i, steps))
                except StopIteration as stop:
                    results[i] = stop.value
            live = still
    finally:
        for steps in passes:
            steps.close()
    return [result for result in results if result is not None]
