"""Small integers, a scale and a zero point for each group of inputs: what GPTQ, AWQ and compressed-tensors share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_ray.model.formats.grouped import MIDDLE, GroupedCodes, Grouping
from moe_ray.model.formats.weight_format import BadTensor, Source, TensorEntry

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Integers:
    """A weight [N, K]: value[n, k] = scales[n, g] * (codes[n, k] - MIDDLE[bits] - zeros[n, g]), g the group of input k.

    Input k is of group k * G // K, or index[k]; without zeros they are 0.
    """

    bits: int
    """4 or 8: the width of `GroupedCodes` that holds them."""
    codes: np.ndarray  # uint8 [N, K]
    scales: np.ndarray  # float32 [N, G]
    zeros: np.ndarray | None = None  # float32 [N, G]
    index: np.ndarray | None = None  # [K]

    def values(self) -> np.ndarray:
        """float32 [N, K]: the difference is exact, the product the nearest float32."""
        import numpy as np

        n, k = self.codes.shape
        values = self.codes.astype(np.float32)
        values -= np.float32(MIDDLE[self.bits])
        if self.index is None:
            grouped = values.reshape(n, self.scales.shape[1], -1)
            if self.zeros is not None:
                grouped -= self.zeros[:, :, None]
            grouped *= self.scales[:, :, None]
            return grouped.reshape(n, k)
        if self.zeros is not None:
            values -= np.take(self.zeros, self.index, axis=1)
        values *= np.take(self.scales, self.index, axis=1)
        return values

    def grouped(self, grouping: Grouping) -> GroupedCodes:
        """The same in the kernels' form, of groups that are all of one size."""
        import numpy as np

        offsets = None if self.zeros is None else -self.scales * self.zeros
        if self.index is None:
            return GroupedCodes(grouping, self.codes, self.scales, offsets)
        order = order_of(self.index)
        return GroupedCodes(grouping, np.take(self.codes, order, axis=1), self.scales, offsets, order)


@dataclass(frozen=True, slots=True)
class Columns:
    """How a weight's inputs lie in groups, as its group index (GPTQ's act-order, Frantar et al. 2022) says."""

    group: int | None
    """Inputs of each; None: not the same of all."""
    reordered: bool = False
    """Whether the index is needed: consecutive inputs are of other groups than it would be without."""

    @staticmethod
    def of(source: Source, name: str, owner: str, k: int, groups: int, told: int | None = None) -> Columns:
        """By the index `name` of the tensor `owner`; without one, by `groups` equal parts of `k` inputs.

        `told`: the size of a group in the checkpoint's configuration. Raises `BadTensor`.
        """
        import numpy as np

        even = k // groups if groups and k % groups == 0 else None
        entry = source.entry(name)
        if entry is not None and (entry.shape != (k,) or entry.dtype not in ("I32", "I64")):
            raise BadTensor(name, f"{entry.dtype} of shape {list(entry.shape)}, I32 of [{k}] expected")
        index = None if entry is None else source.read(name)
        if index is None or is_all(index, -1):  # -1: as it was initialised
            if even is None or (told is not None and told != even and groups > 1):
                size = "of one size" if told is None else f"of {told}"
                raise BadTensor(owner, f"{groups} groups {size} for {k} inputs, and no {name} says which has which")
            return Columns(even)
        if index.min() < 0 or index.max() >= groups:
            raise BadTensor(name, f"damaged: groups {index.min()} to {index.max()}, the weight has 0 to {groups - 1}")
        if even is not None and np.array_equal(index, np.arange(k) // even):
            return Columns(even)
        equal = even is not None and is_all(np.bincount(index, minlength=groups), even)
        return Columns(even if equal else None, reordered=True)


def is_all(array: np.ndarray, value: int) -> bool:
    """Whether all elements are this one."""
    return bool((array == value).all())


def order_of(index: np.ndarray) -> np.ndarray:
    """The inputs, sorted by their groups and in their own order inside each: int32 [K] of `GroupedCodes`."""
    import numpy as np

    return np.argsort(index, kind="stable").astype(np.int32)


def index_of(order: np.ndarray, group: int) -> np.ndarray:
    """The inverse of `order_of` for groups of one size: the group of each input, int32 [K]."""
    import numpy as np

    index = np.empty(len(order), np.int32)
    index[order] = np.arange(len(order), dtype=np.int32) // group
    return index


def expect_shape(name: str, entry: TensorEntry, shape: tuple[int, ...], why: str) -> None:
    """Raise `BadTensor` where a tensor has another shape; `why` says what implies it."""
    if entry.shape != shape:
        raise BadTensor(name, f"shape {list(entry.shape)}, {why} implies {list(shape)}")
