"""Two models on one text, one in memory at a time: A's predictions wait on disk for B's."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from moe_ray.errors import ConfigError
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.model_config import ModelConfig
from moe_ray.quality.comparison import Comparison, Difference, RoutingAgreement, compare_predictions
from moe_ray.quality.perplexity import OnWindow, Perplexity
from moe_ray.quality.scorer import Routing, Scored, Scorer
from moe_ray.quality.spool import Spool, SpoolDtype
from moe_ray.quality.windows import Passage

SHOWN: Final = 8
"""How many of the first differences are kept."""

Load = Callable[[], Scorer]
"""Loads one of the models; it is in memory until the other one is loaded."""


@dataclass(slots=True, eq=False)
class _Run:
    """One model's way through the text."""

    passage: Passage
    backend: Backend
    losses: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0

    def through(self, scorer: Scorer, done: OnWindow) -> Iterator[tuple[int, Scored]]:
        """(position of the first predicted token, predictions), in the order of the text."""
        plan = self.passage.windows()
        for number, window in enumerate(plan, 1):
            position = window.first
            started = time.perf_counter()
            token_ids = self.passage.token_ids[window.start : window.end]
            for scored in scorer.score(token_ids, window.first - window.start):
                self.losses.append(scored.losses().numpy())
                self.seconds += time.perf_counter() - started
                yield position, scored
                position += len(scored.targets)
                started = time.perf_counter()
            done(number, len(plan))

    def perplexity(self) -> Perplexity:
        computed = sum(w.end - w.start - 1 for w in self.passage.windows())
        return Perplexity(np.concatenate(self.losses), self.seconds, computed, self.backend)


def compare(
    load_a: Load,
    load_b: Load,
    passage: Passage,
    spool_dtype: SpoolDtype = "float32",
    on_window: Callable[[str, int, int], None] = lambda which, done, total: None,
) -> Comparison:
    """Score a passage by A, then by B. `on_window` is called with ("A" or "B", windows done, windows in all).

    Raises `ConfigError` where the models have other vocabularies or the disk no room, `InvalidRequest` for a text of
    fewer than two tokens.
    """
    positions = sum(w.scored for w in passage.windows())
    routing_a: list[Routing] = []
    scorer = load_a()
    model_a = scorer.model
    a = _Run(passage, scorer.compute.backend)
    spool = Spool(positions, model_a.vocab_size, spool_dtype)
    try:
        for _, scored in a.through(scorer, lambda done, total: on_window("A", done, total)):
            spool.put(scored.logits)
            routing_a.append(scored.routing)
        del scorer
        gc.collect()
        spool.rewind()
        return _against(model_a, a, routing_a, spool, load_b(), on_window)
    finally:
        spool.close()


def _against(
    model_a: ModelConfig,
    a: _Run,
    routing_a: Sequence[Routing],
    spool: Spool,
    scorer: Scorer,
    on_window: Callable[[str, int, int], None],
) -> Comparison:
    """Score by B, and compare with what A left."""
    model_b = scorer.model
    if model_a.vocab_size != model_b.vocab_size:
        raise ConfigError(
            f"the models have other vocabularies: {model_a.vocab_size:,} tokens and {model_b.vocab_size:,}"
        )
    agreement = None
    if _experts_of(model_a) == _experts_of(model_b):
        agreement = RoutingAgreement(model_b.mixture_layers, model_b.num_local_experts)
    kl, same = [], []
    differences: list[Difference] = []
    b = _Run(a.passage, scorer.compute.backend)
    chunks = b.through(scorer, lambda done, total: on_window("B", done, total))
    for before, (position, scored) in zip(routing_a, chunks, strict=True):
        found = compare_predictions(spool.take(len(scored.targets)), scored.logits, position)
        kl.append(found.kl)
        same.append(found.same_top)
        differences += found.differences[: SHOWN - len(differences)]
        if agreement is not None:
            agreement.add(before, scored.routing)
    layers = None if agreement is None else agreement.layers()
    return Comparison(
        a.perplexity(), b.perplexity(), np.concatenate(kl), np.concatenate(same), tuple(differences), layers
    )


def _experts_of(model: ModelConfig) -> tuple[tuple[int, ...], int, int]:
    return model.mixture_layers, model.num_local_experts, model.num_experts_per_tok
