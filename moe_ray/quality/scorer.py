"""A model in this process that gives the logits of every position of a text, as its server would compute them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from moe_ray import core
from moe_ray.config import Config
from moe_ray.core import Batch, Request
from moe_ray.engine.build import load_trunk
from moe_ray.engine.kv_cache import KVCache, cache_dtype
from moe_ray.engine.torch_threads import torch_threads
from moe_ray.errors import ConfigError
from moe_ray.experts.local import local_experts
from moe_ray.model import moe
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk import interleave

MOST_ROWS: Final = 512
"""Positions that are computed at once: their logits are in memory together."""

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) while things load."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Where the tokens of a batch went, in every layer with experts."""

    experts: torch.Tensor  # [T, layers with experts, K], ascending
    weights: torch.Tensor  # float32, as `experts`

    def last(self, count: int) -> Routing:
        """That of the last tokens."""
        return Routing(self.experts[-count:], self.weights[-count:])


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Predictions of consecutive tokens of a window."""

    logits: torch.Tensor  # float32 [T, V]
    targets: torch.Tensor  # int64 [T], the tokens that follow in the text
    routing: Routing  # of the positions that predict them

    def losses(self) -> torch.Tensor:
        """Negative log likelihood of each target in nats, float32 [T]."""
        return torch.nn.functional.cross_entropy(self.logits, self.targets, reduction="none")


class RoutingRecorder:
    """`Experts` that passes everything on, and keeps what was chosen until it is taken."""

    def __init__(self, experts: moe.Experts) -> None:
        self._experts = experts
        self._chosen: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._layer = -1

    def submit(self, layer: int, routed: moe.Routed) -> moe.PendingCalls:
        """Send the rows of one layer to their experts; layers come in their order."""
        assert layer > self._layer, "one pass at a time"
        self._layer = layer
        here = routed.on_host()
        self._chosen.append(torch.from_numpy(moe.experts_of(here)))
        self._weights.append(here.weights[here.row_of.long()])
        return self._experts.submit(layer, routed)

    def take(self) -> Routing:
        """What was chosen in all layers with experts since the last time."""
        routing = Routing(torch.stack(self._chosen, dim=1), torch.stack(self._weights, dim=1))
        self._chosen, self._weights, self._layer = [], [], -1
        return routing


class Scorer:
    """A loaded model, experts and trunk in this process. Used by one thread.

    >>> for scored in scorer.score(token_ids): scored.losses()
    """

    def __init__(self, config: Config, directory: Path, context: int, progress: Progress | None = None) -> None:
        """Load the model of `directory` for windows of `context` tokens. Raises `CheckpointError`, `ConfigError`."""
        checkpoint = Checkpoint.open(directory)
        self.model: ModelConfig = checkpoint.config
        if context > self.model.max_position_embeddings:
            raise ConfigError(
                f"--context: this model has positions for {self.model.max_position_embeddings} tokens, got {context}"
            )

        def watch(what: str) -> Callable[[int, int], None]:
            return lambda done, total: None if progress is None else progress(what, done, total)

        recorder: list[RoutingRecorder] = []

        def make_experts(compute: Compute) -> moe.Experts:
            of = config.experts
            experts = local_experts(
                checkpoint,
                compute,
                lambda e: watch(f"Expert{e}"),
                of.quantize_of,
                offload_bytes=of.offload_bytes_of,
            )
            recorder.append(RoutingRecorder(experts))
            return recorder[0]

        config = config.model_copy(update={"model": config.model.model_copy(update={"max_model_len": context})})
        self._trunk, self.compute = load_trunk(config, checkpoint, make_experts, watch("Trunk"))
        checkpoint.close()
        (self._recorder,) = recorder
        size = config.engine.block_size
        blocks = -(-context // size)
        self._blocks = list(range(blocks))
        held = cache_dtype(config.engine.kv_cache_dtype, self._trunk.dtype)
        self._cache = KVCache(self._trunk.config, blocks, size, held, self._trunk.device)

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int], first: int = 1) -> Iterator[Scored]:
        """Predict the tokens of one window from number `first` on, at most `MOST_ROWS` at a time, in order.

        `token_ids` are at most `context`. Nothing is computed of the last one.
        """
        inputs = token_ids[:-1]
        for start in range(0, len(inputs), MOST_ROWS):
            end = min(start + MOST_ROWS, len(inputs))
            wanted = min(end - start, end + 1 - first)
            logits = self._forward(inputs, start, end, max(wanted, 0))
            routing = self._recorder.take()
            if wanted > 0:
                targets = torch.tensor(token_ids[end + 1 - wanted : end + 1])
                yield Scored(logits.cpu(), targets, routing.last(wanted))

    def _forward(self, inputs: Sequence[int], start: int, end: int, wanted: int) -> torch.Tensor:
        """Compute positions [start, end) behind those in the cache; logits of the last `wanted`, [wanted, V]."""
        sequence = core.Sequence(Request("text", tuple(inputs), core.SamplingParams()), list(inputs))
        sequence.block_table = self._blocks
        batch = Batch(
            sequences=[sequence],
            token_ids=list(inputs[start:end]),
            positions=list(range(start, end)),
            slot_mapping=list(range(start, end)),  # the block table is the identity
            query_start=[0, end - start],
            context_lens=[end],
            num_sampled=[wanted],
        )
        with torch_threads(1) if self._trunk.own_threads else contextlib.nullcontext():
            (logits,) = interleave([self._trunk.forward(batch, self._cache)])
        return logits
