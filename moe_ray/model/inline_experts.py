"""Experts beside the trunk that calls them: no calls, no replicas. What a draft model's trunk is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_ray.model import moe
from moe_ray.model.expert import ExpertFFN


class InlineExperts:
    """`moe.Experts` that compute at once, on the device of the rows."""

    def __init__(self, ffn: ExpertFFN) -> None:
        """`ffn`: every expert of every layer."""
        self._ffn = ffn

    @property
    def nbytes(self) -> int:
        """Bytes of weights held in memory."""
        return self._ffn.nbytes

    def submit(self, layer: int, routed: moe.Routed) -> _Computed:
        """Compute the rows of one layer."""
        counts = routed.counts
        if len(counts) == 1:
            return _Computed(self._ffn.forward((layer, 0), routed.rows, routed.weights))
        made, start = [], 0
        for expert, count in enumerate(counts):
            if count:
                rows, weights = routed.rows[start : start + count], routed.weights[start : start + count]
                made.append(self._ffn.forward((layer, expert), rows, weights))
                start += count
        return _Computed(torch.cat(made))


@dataclass(frozen=True, slots=True, eq=False)
class _Computed:
    """`moe.PendingCalls` that are done."""

    rows: torch.Tensor  # [T * K, D]

    def gather(self) -> moe.Gathered:
        return moe.Gathered(self.rows)

    def abandon(self) -> None:
        """Nothing is under way."""
