"""Weights on their way into memory: known by shape and format, read when a backend takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from moe_ray.model.formats import GroupedCodes, Grouping, StoredWeight


class Matrix(Protocol):
    """One weight [N, K] that has not been read yet."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def format(self) -> str:
        """A row of `FORMATS`."""
        ...

    @property
    def grouping(self) -> Grouping | None:
        """How it is quantised, where it can be had as `codes`; None: as floats only."""
        ...

    @property
    def bits(self) -> float:
        """Bits of a weight where it is stored."""
        ...

    def values(self) -> np.ndarray:
        """Its values [N, K] in a float dtype. May raise `CheckpointError`."""
        ...

    def codes(self) -> GroupedCodes:
        """Its codes, where there is a grouping. May raise `CheckpointError`."""
        ...


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """`Matrix` of a checkpoint."""

    stored: StoredWeight
    read_values: Callable[[], np.ndarray]
    read_codes: Callable[[], GroupedCodes]

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.stored.shape
        return n, k

    @property
    def format(self) -> str:
        return self.stored.format

    @property
    def grouping(self) -> Grouping | None:
        return self.stored.grouping

    @property
    def bits(self) -> float:
        return 8 * self.stored.nbytes / math.prod(self.stored.shape)

    def values(self) -> np.ndarray:
        return self.read_values()

    def codes(self) -> GroupedCodes:
        return self.read_codes()


@dataclass(frozen=True, slots=True)
class FloatMatrix:
    """`Matrix` of a tensor [N, K] in memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.tensor.shape
        return n, k

    @property
    def format(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def grouping(self) -> None:
        return

    @property
    def bits(self) -> float:
        return 8.0 * self.tensor.itemsize

    def values(self) -> np.ndarray:
        import ml_dtypes
        import torch

        if self.tensor.dtype == torch.bfloat16:
            return self.tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        array: np.ndarray = self.tensor.numpy()
        return array

    def codes(self) -> GroupedCodes:
        raise AssertionError("a matrix of floats has no codes")


def tensor_of(values: np.ndarray) -> torch.Tensor:
    """A tensor over an array's memory; bfloat16 as ml_dtypes has it, which torch does not take from numpy."""
    import torch

    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(values)
