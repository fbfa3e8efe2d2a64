"""How far a model's predictions of a text, and its routing, are from another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from moe_ray.quality.perplexity import Estimate, Perplexity
from moe_ray.quality.scorer import Routing

_ROWS: Final = 128
"""Predictions that are compared at once: several copies of them are in memory."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A position at which the most likely token is another one."""

    position: int
    """Of the predicted token in the text."""
    token_a: int
    token_b: int
    probability_a: float
    """Of `token_a`, by A."""
    probability_b: float
    """Of `token_b`, by B."""


@dataclass(frozen=True, slots=True)
class LayerAgreement:
    """How alike two models route in one layer."""

    layer: int
    same_experts: float
    """Share of (token, k) pairs of A whose expert is among the token's experts in B, too."""
    weight_difference: float
    """Mean over tokens of half the summed differences of the experts' weights: 0 alike, 1 nothing in common."""


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """Two models' predictions of the same T tokens."""

    kl: np.ndarray
    """KL(A || B) of each prediction, float64 [T], nats."""
    same_top: np.ndarray
    """Whether the most likely token is the same, bool [T]."""
    differences: tuple[Difference, ...]
    """Where it is not, in the order of the text."""


def compare_predictions(a: torch.Tensor, b: torch.Tensor, first_position: int) -> Compared:
    """Compare logits [T, V] of two models; the first row predicts token `first_position` of the text.

    KL(A || B) = sum over tokens v of p_A(v) (log p_A(v) - log p_B(v)), sums in float64.
    """
    kl, same, differences = [], [], []
    for start in range(0, len(a), _ROWS):
        log_a = a[start : start + _ROWS].double().log_softmax(-1)
        log_b = b[start : start + _ROWS].double().log_softmax(-1)
        kl.append((log_a.exp() * (log_a - log_b)).sum(-1).clamp_min(0).numpy())
        best_a, token_a = log_a.max(-1)
        best_b, token_b = log_b.max(-1)
        alike = token_a == token_b
        same.append(alike.numpy())
        differences += [
            Difference(
                first_position + start + row,
                int(token_a[row]),
                int(token_b[row]),
                float(best_a[row].exp()),
                float(best_b[row].exp()),
            )
            for row in (~alike).nonzero().flatten().tolist()
        ]
    return Compared(np.concatenate(kl), np.concatenate(same), tuple(differences))


class RoutingAgreement:
    """Sums up how alike the tokens of two models are routed."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        """`layers`: those with experts."""
        self._layers, self._num_experts = tuple(layers), num_experts
        self._same = torch.zeros(len(layers), dtype=torch.float64)
        self._apart = torch.zeros(len(layers), dtype=torch.float64)
        self._pairs = self._tokens = 0

    def add(self, a: Routing, b: Routing) -> None:
        """Add the routing of the same T tokens in both."""
        in_b = (a.experts[..., :, None] == b.experts[..., None, :]).any(-1)  # [T, layers, K]
        self._same += in_b.sum((0, 2))
        self._apart += (self._spread(a) - self._spread(b)).abs().sum((0, 2)) / 2
        self._pairs += a.experts.shape[0] * a.experts.shape[2]
        self._tokens += a.experts.shape[0]

    def layers(self) -> tuple[LayerAgreement, ...]:
        """Of each layer with experts, from the first."""
        return tuple(
            LayerAgreement(layer, same / self._pairs, apart / self._tokens)
            for layer, same, apart in zip(self._layers, self._same.tolist(), self._apart.tolist(), strict=True)
        )

    def _spread(self, routing: Routing) -> torch.Tensor:
        """The weights by expert, zeros for those not chosen, float64 [T, layers, E]."""
        experts = routing.experts.long()
        empty = torch.zeros((*experts.shape[:2], self._num_experts), dtype=torch.float64)
        return empty.scatter_(-1, experts, routing.weights.double())


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Two models on one text."""

    a: Perplexity
    b: Perplexity
    kl: np.ndarray
    """KL(A || B) of each prediction, float64 [T], nats."""
    same_top: np.ndarray
    """Whether both find the same token most likely, bool [T]."""
    differences: tuple[Difference, ...]
    """The first positions where they do not."""
    routing: tuple[LayerAgreement, ...] | None
    """By layer; None where the models have other layers or experts."""

    @property
    def ratio(self) -> Estimate:
        """Perplexity of B by that of A, its error from the differences token by token."""
        return Estimate.of(self.b.losses.astype(np.float64) - self.a.losses).exp()

    @property
    def mean_kl(self) -> Estimate:
        return Estimate.of(self.kl)

    @property
    def top_agreement(self) -> Estimate:
        """Share of tokens for which both find the same token most likely."""
        return Estimate.of(self.same_top)
