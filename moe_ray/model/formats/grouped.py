"""A weight as small integers with a scale for each group of inputs: what lies between quantised formats and kernels.

Every format that quantises by groups gives its weights in this one form (`WeightFormat.codes`), and every kernel packs
this one form. So a format knows no kernel, and a kernel no format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import numpy as np

LONGEST: Final = 128
"""Inputs that share a scale in memory, at most."""
MIDDLE: Final = {4: 8, 8: 128}
"""Bits → the code that stands for 0 where a weight has neither levels nor offsets."""
Float8 = Literal["e4m3", "e5m2"]
"""8-bit floats by their bits of exponent and mantissa (OCP 8-bit Floating Point Specification, section 5)."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """How a weight [N, K] is quantised. Plain values: known before any of its bytes are read."""

    bits: int
    """Of a code: 4 or 8."""
    group: int
    """Consecutive inputs that share a scale; it divides K."""
    offsets: bool = False
    """Whether each group has an offset as well (an asymmetric format)."""
    levels: tuple[float, ...] | None = None
    """The 16 values of a 4-bit code in a format with a table (NF4, FP4); None: a code stands for itself."""
    reordered: bool = False
    """Whether the columns lie in another order than the inputs (GPTQ's act-order)."""
    float8: Float8 | None = None
    """What floats the codes of 8 bits are; None: they are integers."""

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a weight in memory: codes, and 2 for each scale and each offset, 4 for each scale of float8.

        Kernels repeat what more inputs share than `LONGEST`, but not the scales of float8.
        """
        n, k = shape
        if self.float8 is not None:
            return n * k + 4 * n * (k // self.group)
        per_group = 2 * (1 + self.offsets)
        return n * k * self.bits // 8 + n * (k // gcd(self.group, LONGEST)) * per_group


@dataclass(frozen=True, slots=True, eq=False)
class GroupedCodes:
    """A weight [N, K], G = K / group.

    value[n, order[j]] = scale[n, j // group] * level(code[n, j]) + offset[n, j // group], where level(c) is levels[c],
    the float of the bits c, or c - MIDDLE[bits]. Without an order, order[j] = j; without offsets they are 0.

    >>> codes.values()  # float32 [N, K]
    """

    grouping: Grouping
    codes: np.ndarray = field(repr=False)
    """uint8 [N, K], one code each, 0 to 2**bits - 1."""
    scales: np.ndarray = field(repr=False)
    """float32 [N, G]"""
    offsets: np.ndarray | None = field(default=None, repr=False)
    """float32 [N, G]"""
    order: np.ndarray | None = field(default=None, repr=False)
    """int32 [K]: the input of each column."""

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    def rows(self, part: slice) -> GroupedCodes:
        """The weight of some of its rows, a view."""
        offsets = None if self.offsets is None else self.offsets[part]
        return GroupedCodes(self.grouping, self.codes[part], self.scales[part], offsets, self.order)

    def values(self) -> np.ndarray:
        """The weight's values, float32 [N, K]: products and sums in float32, in the order of the formula."""
        import numpy as np

        how = self.grouping
        if how.levels is not None:
            levels = np.asarray(how.levels, dtype=np.float32)[self.codes]
        elif how.float8 is not None:
            levels = float8_values(how.float8)[self.codes]
        else:
            levels = self.codes.astype(np.float32) - np.float32(MIDDLE[how.bits])
        n, k = self.shape
        grouped = levels.reshape(n, k // how.group, how.group) * self.scales[:, :, None]
        if self.offsets is not None:
            grouped += self.offsets[:, :, None]
        values = grouped.reshape(n, k)
        if self.order is None:
            return values
        ordered = np.empty_like(values)
        ordered[:, self.order] = values
        return ordered


def float8_values(kind: Float8) -> np.ndarray:
    """The number of each of the 256 codes, float32 [256]; some are infinite or no number."""
    import ml_dtypes
    import numpy as np

    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[kind]
    values: np.ndarray = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return values
