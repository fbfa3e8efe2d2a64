"""The perplexity of a model on a text, with its standard error."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_ray.quality.windows import Passage

if TYPE_CHECKING:
    from moe_ray.model.compute.resolve import Backend
    from moe_ray.quality.scorer import Scorer

OnWindow = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tokens and its standard error."""

    mean: float
    error: float

    @staticmethod
    def of(values: np.ndarray) -> Estimate:
        """Of values [T], T at least 1. The error takes tokens for independent; of one token it is not a number."""
        values = values.astype(np.float64)
        spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        return Estimate(float(values.mean()), spread / math.sqrt(len(values)))

    def exp(self) -> Estimate:
        """The same of e to its power, to first order: perplexity of a mean loss, ratio of a mean difference."""
        value = math.exp(self.mean)
        return Estimate(value, value * self.error)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts a text."""

    losses: np.ndarray  # float32 [T], nats
    seconds: float
    """Of computing; not of loading."""
    computed: int
    """Positions that were computed; where windows overlap, more than were scored."""
    backend: Backend
    """What computed them."""

    @property
    def loss(self) -> Estimate:
        """Mean negative log likelihood of a token, in nats."""
        return Estimate.of(self.losses)

    @property
    def value(self) -> Estimate:
        """exp(mean negative log likelihood)."""
        return self.loss.exp()

    @property
    def tokens_per_s(self) -> float:
        return self.computed / self.seconds if self.seconds else math.inf


def perplexity(scorer: Scorer, passage: Passage, on_window: OnWindow | None = None) -> Perplexity:
    """Score a passage in its windows. Raises `InvalidRequest` for a text of fewer than two tokens."""
    plan = passage.windows()
    started = time.perf_counter()
    losses = []
    for done, window in enumerate(plan, 1):
        for scored in scorer.score(passage.token_ids[window.start : window.end], window.first - window.start):
            losses.append(scored.losses().numpy())
        if on_window is not None:
            on_window(done, len(plan))
    seconds = time.perf_counter() - started
    computed = sum(w.end - w.start - 1 for w in plan)
    return Perplexity(np.concatenate(losses), seconds, computed, scorer.compute.backend)
