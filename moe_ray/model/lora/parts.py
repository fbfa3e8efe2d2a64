"""What an adapter adds to the weights of a model: products of two thin matrices, or whole matrices in their stead.

LoRA: Hu et al. 2021 (arXiv:2106.09685). Arrays are numpy's, so that a process without torch can hold them; bfloat16 is
that of ml_dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_ray.model.families import ExpertRole

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Adds scale * b a to a matrix [N, K]."""

    a: np.ndarray  # [r, K]
    b: np.ndarray  # [N, r]
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPart:
    """What is added to one expert in one layer; None: nothing to this matrix."""

    gate: LowRank | None = None  # to w1 [I, D]; may share its `a` with `up`
    up: LowRank | None = None  # to w3 [I, D]
    down: LowRank | None = None  # to w2 [D, I]

    @staticmethod
    def of(parts: Mapping[ExpertRole, LowRank]) -> ExpertPart:
        return ExpertPart(parts.get("gate"), parts.get("up"), parts.get("down"))


@dataclass(frozen=True, slots=True, eq=False)
class LayerPart:
    """What is added to one layer of the trunk; None: nothing to this matrix."""

    q: LowRank | None = None
    k: LowRank | None = None
    v: LowRank | None = None
    out: LowRank | None = None
    router: LowRank | None = None
    shared: ExpertPart = field(default_factory=ExpertPart)
    """To the expert that every token goes to, or to what a layer without experts has in their stead."""
    share: LowRank | None = None  # to what says how much of that expert counts [1, D]


@dataclass(frozen=True, slots=True, eq=False)
class MatrixPart:
    """What becomes of the embedding or the head: a matrix of its own, to which something may be added."""

    whole: np.ndarray | None = None  # [V, D] in the model's stead
    low_rank: LowRank | None = None  # of the embedding transposed: a [r, V], b [D, r]


@dataclass(frozen=True, slots=True, eq=False)
class TrunkPart:
    """What an adapter adds to a trunk."""

    layers: tuple[LayerPart, ...]
    embed: MatrixPart | None = None
    head: MatrixPart | None = None
