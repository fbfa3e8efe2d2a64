"""Packs quantised weights for the kernels: integers with a scale for each group of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING, Final, Protocol

from moe_ray.native.host import DTYPE_CODES
from moe_ray.native.kernels import INT4, INT8, BlockShape, Kernels, Packed

if TYPE_CHECKING:
    import numpy as np

LARGEST: Final = 2.0**14
"""Of a scale in a block: float16's largest power of two but one. What is smaller keeps 11 bits down to 2**-14."""
GROUPS: Final = (32, 64, 128)
"""Inputs that may share a scale in a block; coarser groups repeat theirs."""


class Grouped(Protocol):
    """How codes are grouped; `formats.Grouping` has the meaning of each."""

    @property
    def bits(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def offsets(self) -> bool: ...
    @property
    def levels(self) -> tuple[float, ...] | None: ...
    @property
    def reordered(self) -> bool: ...
    @property
    def float8(self) -> str | None: ...


class Codes(Protocol):
    """A quantised weight; `formats.GroupedCodes` has the meaning of each."""

    @property
    def grouping(self) -> Grouped: ...
    @property
    def codes(self) -> np.ndarray: ...
    @property
    def scales(self) -> np.ndarray: ...
    @property
    def offsets(self) -> np.ndarray | None: ...
    @property
    def order(self) -> np.ndarray | None: ...


def lacks(grouping: Grouped) -> str:
    """Why kernels cannot compute on codes that are grouped so; empty where they can."""
    if grouping.bits not in (4, 8):
        return f"codes of {grouping.bits} bits"
    if grouping.float8 is not None:
        return "codes that are floats"
    if grouping.group % GROUPS[0]:
        return f"groups of {grouping.group} inputs, which is not a multiple of {GROUPS[0]}"
    if grouping.levels is not None and grouping.bits != 4:
        return f"a table for codes of {grouping.bits} bits"
    return ""


def block_shape(grouping: Grouped, n: int, k: int, count: int = 1, wide_inputs: bool = False) -> BlockShape:
    """The block that `count` such matrices [n, k] are packed into. `wide_inputs` is for codes of 8 bits only."""
    return BlockShape(
        kind=INT4 if grouping.bits == 4 else INT8,
        n=n,
        k=k,
        count=count,
        group=gcd(grouping.group, GROUPS[-1]),
        offsets=grouping.offsets,
        table=grouping.levels is not None,
        order=grouping.reordered,
        wide_inputs=wide_inputs and grouping.bits == 8,
    )


def pack_codes(kernels: Kernels, *weights: Codes, wide_inputs: bool = False) -> Packed:
    """Return matrices [N, K] packed, all of one grouping (see `lacks`) and order. `wide_inputs`: see `BlockShape`."""
    import numpy as np

    grouping = weights[0].grouping
    n, k = weights[0].codes.shape
    packed = kernels.blank(block_shape(grouping, n, k, len(weights), wide_inputs))
    header = packed.header
    step = 1.0
    if grouping.levels is not None:
        step, table = whole_levels(grouping.levels)
        for code, value in enumerate(table):
            header.table[code] = _signed_byte(value + kernels.table_middle)
    parts = [array for weight in weights for array in (weight.scales * step, weight.offsets) if array is not None]
    largest = max(float(np.abs(part).max(initial=0.0)) for part in parts)
    header.multiplier = 2.0 ** np.ceil(np.log2(largest / LARGEST)) if largest > 0 else 1.0
    if weights[0].order is not None:
        _write_order(packed, weights[0].order)
    for index, weight in enumerate(weights):
        codes = np.ascontiguousarray(weight.codes)
        scales = np.ascontiguousarray(weight.scales * np.float32(step / header.multiplier), dtype=np.float32)
        offsets = None
        if weight.offsets is not None:
            offsets = np.ascontiguousarray(weight.offsets / np.float32(header.multiplier), dtype=np.float32)
        kernels.library.pack_codes(
            *(kernels.pool, packed.address, index, codes.ctypes.data, scales.ctypes.data),
            *(None if offsets is None else offsets.ctypes.data, grouping.group),
        )
    return packed


def round_codes(
    kernels: Kernels, values: np.ndarray, grouping: Grouped
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes [N, K], scales and offsets [N, G] of float values [N, K], as `formats.rounding` rounds them.

    But levels, which must ascend, always span the largest value of a group (absmax). Takes the dtypes of kernels.
    """
    import numpy as np

    n, k = values.shape
    source = np.ascontiguousarray(values)
    codes = np.empty((n, k), dtype=np.uint8)
    scales = np.empty((n, k // grouping.group), dtype=np.float32)
    offsets = np.empty_like(scales) if grouping.offsets else None
    levels = None if grouping.levels is None else np.array(grouping.levels, dtype=np.float32)
    kernels.library.round_codes(
        *(kernels.pool, DTYPE_CODES[source.dtype.name], source.ctypes.data, n, k, grouping.bits, grouping.group),
        None if levels is None else levels.ctypes.data,
        *(codes.ctypes.data, scales.ctypes.data, None if offsets is None else offsets.ctypes.data),
    )
    return codes, scales, offsets


def whole_levels(levels: Sequence[float], most: int = 127) -> tuple[float, tuple[int, ...]]:
    """A step, and the table as whole multiples of it, up to `most`: exact where such a step exists, else the nearest.

    >>> whole_levels((0.0, 0.5, 1.0, 1.5))
    (0.5, (0, 1, 2, 3))
    """
    largest = max(map(abs, levels))
    for multiple in range(1, most + 1):
        step = largest / multiple
        if all((level / step).is_integer() for level in levels):
            return step, tuple(round(level / step) for level in levels)
    step = largest / most
    return step, tuple(round(level / step) for level in levels)


def _signed_byte(value: int) -> int:
    return value - 256 if value > 127 else value


def _write_order(packed: Packed, order: np.ndarray) -> None:
    import numpy as np

    shape = packed.shape
    panels = shape.count * -(-shape.n // 16)
    of_groups = -(-panels * (shape.k // shape.group) * 16 * 2 // 64) * 64
    start = 256 + of_groups * (1 + shape.offsets)
    packed.memory[start : start + 4 * shape.k] = np.ascontiguousarray(order, dtype=np.int32).tobytes()
