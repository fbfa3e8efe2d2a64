"""Two models on one text, one in memory at a time: A's predictions wait on disk for B's."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from moe_ray.errors import ConfigError
from moe_ray.model.model_config import ModelConfig
from moe_ray.quality.comparison import Comparison, Difference, RoutingAgreement, compare_predictions
from moe_ray.quality.perplexity import OnWindow, Perplexity, planned_windows
from moe_ray.quality.scorer import Routing, Scored, Scorer
from moe_ray.quality.spool import Spool, SpoolDtype
from moe_ray.quality.windows import Window

SHOWN: Final = 8
"""How many of the first differences are kept."""

Load = Callable[[], Scorer]
"""Loads one of the models; it is in memory until the other one is loaded."""


@dataclass(slots=True, eq=False)
class _Run:
    """One model's way through the text."""

    plan: Sequence[Window]
    losses: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0

    def through(self, scorer: Scorer, token_ids: Sequence[int], done: OnWindow) -> Iterator[tuple[int, Scored]]:
        """(position of the first predicted token, predictions), in the order of the text."""
        for number, window in enumerate(self.plan, 1):
            position = window.first
            started = time.perf_counter()
            for scored in scorer.score(token_ids[window.start : window.end], window.first - window.start):
                self.losses.append(scored.losses().numpy())
                self.seconds += time.perf_counter() - started
                yield position, scored
                position += len(scored.targets)
                started = time.perf_counter()
            done(number, len(self.plan))

    def perplexity(self) -> Perplexity:
        return Perplexity(np.concatenate(self.losses), self.seconds, sum(w.end - w.start - 1 for w in self.plan))


def compare(
    load_a: Load,
    load_b: Load,
    token_ids: Sequence[int],
    context: int,
    stride: int,
    spool_dtype: SpoolDtype = "float32",
    on_window: Callable[[str, int, int], None] = lambda which, done, total: None,
) -> Comparison:
    """Score `token_ids` by A, then by B. `on_window` is called with ("A" or "B", windows done, windows in all).

    Raises `ConfigError` where the models have other vocabularies or the disk no room, `InvalidRequest` for a text of
    fewer than two tokens.
    """
    plan = planned_windows(token_ids, context, stride)
    a, b = _Run(plan), _Run(plan)
    routing_a: list[Routing] = []
    scorer = load_a()
    model_a = scorer.model
    spool = Spool(sum(w.scored for w in plan), model_a.vocab_size, spool_dtype)
    try:
        for _, scored in a.through(scorer, token_ids, lambda done, total: on_window("A", done, total)):
            spool.put(scored.logits)
            routing_a.append(scored.routing)
        del scorer
        gc.collect()
        spool.rewind()
        return _against(model_a, a, routing_a, spool, load_b(), b, token_ids, on_window)
    finally:
        spool.close()


def _against(
    model_a: ModelConfig,
    a: _Run,
    routing_a: Sequence[Routing],
    spool: Spool,
    scorer: Scorer,
    b: _Run,
    token_ids: Sequence[int],
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
        agreement = RoutingAgreement(model_b.num_hidden_layers, model_b.num_local_experts)
    kl, same = [], []
    differences: list[Difference] = []
    chunks = b.through(scorer, token_ids, lambda done, total: on_window("B", done, total))
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


def _experts_of(model: ModelConfig) -> tuple[int, int, int]:
    return model.num_hidden_layers, model.num_local_experts, model.num_experts_per_tok
