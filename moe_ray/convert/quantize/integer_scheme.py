"""Integers of 4 or 8 bits with a scale for each group of inputs, written as compressed-tensors' "pack-quantized"."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from moe_ray.model.formats import GroupedCodes, Grouping, Place
from moe_ray.model.formats.compressed_tensors import pack_codes
from moe_ray.model.formats.rounding import fit, nearest, round_to_nearest, values_of


@dataclass(slots=True)
class IntegerGrid:
    """`Grid` whose groups get their scales (and offsets) when their first column's turn comes."""

    grouping: Grouping
    _scales: list[torch.Tensor] = field(default_factory=list)
    _offsets: list[torch.Tensor] = field(default_factory=list)

    @property
    def span(self) -> int:
        return self.grouping.group

    def fit(self, rest: torch.Tensor, importance: torch.Tensor) -> None:
        group = self.grouping.group
        scale, offset = fit(rest[:, :group].contiguous(), self.grouping, importance[:group])
        self._scales.append(scale)
        if offset is not None:
            self._offsets.append(offset)

    def round(self, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, offset = self._scales[-1], self._offsets[-1] if self._offsets else None
        codes = nearest(column, scale, offset, self.grouping)
        return codes, values_of(codes, scale, offset, self.grouping)

    def finish(
        self, codes: torch.Tensor, order: torch.Tensor | None, weight: torch.Tensor, hessian: torch.Tensor
    ) -> GroupedCodes:
        return GroupedCodes(
            replace(self.grouping, reordered=order is not None),
            codes.numpy(),
            torch.cat(self._scales, 1).numpy(),
            torch.cat(self._offsets, 1).numpy() if self._offsets else None,
            None if order is None else order.numpy().astype(np.int32),
        )


@dataclass(frozen=True, slots=True)
class IntegerScheme:
    """`Scheme` of one grouping."""

    grouping: Grouping
    damping: float = 1.0

    @property
    def free_order(self) -> bool:
        return False

    def nearest(self, weight: torch.Tensor) -> GroupedCodes:
        return round_to_nearest(weight, self.grouping)

    def grid(self, inputs: int) -> IntegerGrid:
        return IntegerGrid(self.grouping)

    def pack(self, place: Place, codes: GroupedCodes) -> dict[str, torch.Tensor]:
        return pack_codes(place, codes)
