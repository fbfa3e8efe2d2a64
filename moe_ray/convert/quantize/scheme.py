"""What weights are rounded to, and what they are written as: each way a file, with a `Scheme` and a `Grid`."""

from __future__ import annotations

from typing import Protocol

import torch

from moe_ray.model.formats import GroupedCodes, Place


class Grid(Protocol):
    """What the columns of one weight [N, K] are rounded to, one after the other. Has state: a grid for each weight."""

    @property
    def span(self) -> int:
        """Columns between one `fit` and the next."""
        ...

    def fit(self, rest: torch.Tensor, importance: torch.Tensor) -> None:
        """Prepare for the next `span` columns, the first ones of `rest` [N, columns that are not rounded yet].

        `importance` [as many]: what the squared error of each column weighs.
        """
        ...

    def round(self, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes, uint8, and the values of the next column; all [N, 1]."""
        ...

    def finish(
        self, codes: torch.Tensor, order: torch.Tensor | None, weight: torch.Tensor, hessian: torch.Tensor
    ) -> GroupedCodes:
        """The rounded weight. codes, weight (as it was) [N, K], hessian [K, K]: columns and inputs in `order` [K]."""
        ...


class Scheme(Protocol):
    """One way to quantise weights. Stateless."""

    @property
    def free_order(self) -> bool:
        """Whether columns may be rounded in any order at no cost to what computes with them."""
        ...

    @property
    def damping(self) -> float:
        """How many times as much as integers GPTQ damps: the larger the errors are, the less it may trust few rows."""
        ...

    def nearest(self, weight: torch.Tensor) -> GroupedCodes:
        """A weight [N, K] rounded by itself."""
        ...

    def grid(self, inputs: int) -> Grid:
        """For a weight of K = `inputs`."""
        ...

    def pack(self, place: Place, codes: GroupedCodes) -> dict[str, torch.Tensor]:
        """The tensors of a weight in a checkpoint, by name."""
        ...
