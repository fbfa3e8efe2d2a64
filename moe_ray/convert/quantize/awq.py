"""AWQ (Lin et al. 2023, arXiv:2306.00978): inputs that matter are scaled up for rounding, and down where they arise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from moe_ray.model.formats import Grouping
from moe_ray.model.formats.rounding import round_to_nearest

GRID: Final = 10
"""Steps between the exponents 0 and 1 that are tried (section 3.2; the authors' code has 20)."""
LEAST: Final = 1e-4
"""Of an input's mean size, so that one that is hardly ever there is not divided by nothing."""


@dataclass(frozen=True, slots=True)
class Search:
    """What a grid of exponents loses: the sum over the weights that share one scale of their inputs."""

    losses: tuple[float, ...]

    def __add__(self, other: Search) -> Search:
        return Search(tuple(a + b for a, b in zip(self.losses, other.losses, strict=True)))

    @property
    def best(self) -> float:
        """The exponent that loses least; 0, no scaling, where others are no better."""
        return self.losses.index(min(self.losses)) / GRID

    @property
    def gain(self) -> float:
        """How much less is lost than without scaling, as a fraction."""
        return 1 - min(self.losses) / self.losses[0] if self.losses[0] else 0.0


def search(weights: Sequence[torch.Tensor], rows: torch.Tensor, size: torch.Tensor, grouping: Grouping) -> Search:
    """What rounding weights [N, K] loses in their outputs of `rows` [M, K], for each exponent of `size` [K]."""
    losses = []
    joined = torch.cat(list(weights))
    for step in range(GRID + 1):
        scale = scale_of(size, step / GRID)
        rounded = torch.from_numpy(round_to_nearest(joined * scale, grouping, search=False).values()) / scale
        losses.append(float(((rounded - joined) @ rows.T).square().sum()))
    return Search(tuple(losses))


def scale_of(size: torch.Tensor, exponent: float) -> torch.Tensor:
    """The factor on each input [K] of a weight: its mean size to the exponent, centred on 1."""
    scale = size.clamp_min(LEAST * float(size.mean())) ** exponent
    return scale / (scale.max() * scale.min()).sqrt()
