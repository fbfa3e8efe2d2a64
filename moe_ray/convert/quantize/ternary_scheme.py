"""Ternary weights, most of them 0, for a file of a bit a weight or less. Research.

As QMoE (Frantar & Alistarh 2023, arXiv:2310.16795): GPTQ onto -1, 0 and 1 times a scale of the row, and a code of short
words for the many zeros. Unlike it, how many zeros there are is chosen, not found: a weight is 0 unless being something
else gains enough in squared error, and how much is enough makes the file as large as it may be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import torch

from moe_ray.model.formats import GroupedCodes, Grouping, Place
from moe_ray.model.formats.grouped import MIDDLE
from moe_ray.model.formats.ternary import pack_ternary
from moe_ray.model.formats.word_code import bits_of

SPAN: Final = 32
"""Columns between two looks at how many may still be something else than 0."""
SAMPLED: Final = 1 << 18
"""Weights among which the gain that is enough is searched."""
SCALE_BITS: Final = 16
EVEN: Final = 0.99
"""Of the bits that there are, so many are planned with: weights are not as evenly other than 0 as `bits_of` has it."""
LEAST_SHARE: Final = 0.01
MOST_SHARE: Final = 0.54
"""Of weights that are not 0. With the most, three levels fit a normal distribution best (Max 1960, "Quantizing for
minimum distortion"): more would lose more, and take more bits."""


@dataclass(slots=True)
class TernaryGrid:
    """`Grid` that makes `share` of a weight's columns other than 0. Its codes are of 4 bits, in groups of a row."""

    share: float
    span: int = SPAN
    _scale: torch.Tensor = field(init=False)  # [N, 1]
    _least: float = 0.0
    """The gain that is enough."""
    _rounded: int = 0
    """Weights that are rounded already."""
    _others: int = 0
    """How many of them are not 0."""

    def fit(self, rest: torch.Tensor, importance: torch.Tensor) -> None:
        if not self._rounded:
            largest = rest.abs().topk(max(1, round(self.share * rest.shape[1])), dim=1).values
            self._scale = _storable(largest.mean(1, keepdim=True))
        wanted = (self.share * (self._rounded + rest.numel()) - self._others) / rest.numel()
        rows = slice(None, None, max(1, rest.numel() // SAMPLED))
        gains = _gain(rest[rows], self._scale[rows]).flatten()
        count = min(max(round(wanted * len(gains)), 1), len(gains))
        self._least = max(0.0, float(gains.kthvalue(len(gains) - count + 1).values))

    def round(self, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        levels = torch.sign(column) * (_gain(column, self._scale) >= self._least)
        self._rounded += column.numel()
        self._others += int(levels.count_nonzero())
        return (levels + MIDDLE[4]).to(torch.uint8), levels * self._scale

    def finish(
        self, codes: torch.Tensor, order: torch.Tensor | None, weight: torch.Tensor, hessian: torch.Tensor
    ) -> GroupedCodes:
        """Each row's scale is the one that loses least with these levels: w H t' / t H t'."""
        levels = codes.float() - MIDDLE[4]
        weighed = levels @ hessian
        curvature = (levels * weighed).sum(1, keepdim=True)
        best = (weight * weighed).sum(1, keepdim=True) / curvature
        scale = torch.where(curvature > 0, _storable(best), self._scale)
        columns = codes
        if order is not None:
            columns = torch.empty_like(codes)
            columns[:, order] = codes
        return GroupedCodes(Grouping(4, codes.shape[1]), columns.numpy(), scale.numpy())


@dataclass(frozen=True, slots=True)
class TernaryScheme:
    """`Scheme` of a size."""

    bits: float
    """Of a weight in the file, its scales counted."""
    damping: float = 4.0
    """On the demo model's layers, other text to measure on, 3 and 6 lost a tenth less than 1, and 12 no less."""

    @property
    def free_order(self) -> bool:
        return True  # a scale is of all columns

    def nearest(self, weight: torch.Tensor) -> GroupedCodes:
        k = weight.shape[1]
        grid = self.grid(k)
        values = weight.float()
        grid.fit(values, torch.ones(k))
        codes, _ = grid.round(values)
        levels = codes.float() - MIDDLE[4]
        count = levels.abs().sum(1, keepdim=True)
        scale = _storable((values * levels).sum(1, keepdim=True) / count.clamp_min(1))
        return GroupedCodes(Grouping(4, k), codes.numpy(), scale.numpy())

    def grid(self, inputs: int) -> TernaryGrid:
        return TernaryGrid(share_of(EVEN * self.bits - SCALE_BITS / inputs))

    def pack(self, place: Place, codes: GroupedCodes) -> dict[str, torch.Tensor]:
        return pack_ternary(place, codes)


@lru_cache(maxsize=64)
def share_of(bits: float) -> float:
    """The share of digits that may be other than 0, for `bits` a digit in words; from `LEAST_SHARE` to `MOST_SHARE`."""
    low, high = LEAST_SHARE, MOST_SHARE
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if bits_of(middle) > bits else (middle, high)
    return low


def _gain(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """How much smaller the squared error of a weight w is as sign(w) times its scale than as 0."""
    return scale * (2 * values.abs() - scale)


def _storable(scale: torch.Tensor) -> torch.Tensor:
    return scale.bfloat16().float()
