"""HQQ's weights (Badri and Shaji 2023, mobiusml.github.io/hqq_blog), as transformers saves them.

The weight's elements in their order make a matrix: with axis 1 a row for each group, with axis 0 a column. value =
scale * (code - zero), zero a float. Codes of `bits` lie in bytes, 8 / bits rows of the matrix in one: the first part of
the rows in the highest bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.grouped import MIDDLE, GroupedCodes, Grouping
from moe_ray.model.formats.weight_format import BadTensor, Place, ShapeMismatch, Source, StoredWeight, TensorPart

if TYPE_CHECKING:
    import numpy as np

CODES, SCALES, ZEROS, SHAPE, BITS = "W_q", "scale", "zero", "shape", "nbits"
NESTED: Final = ("quant_scale", "quant_zero")
OTHERS: Final = (
    *("axis", "group_size", "packing", "unpack_view_dtype", "view_as_float", "compute_dtype", "offload_meta"),
    *("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
"""What the shapes tell as well, and how it was quantised."""
READ: Final = (8, 4, 2, 1)
FLOATS: Final = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Hqq:
    """`WeightFormat` of 1, 2, 4 and 8 bits."""

    name: str

    def names(self, place: Place) -> tuple[str, ...]:
        return tuple(place.named(suffix) for suffix in (CODES, SCALES, ZEROS, SHAPE, BITS, *NESTED, *OTHERS))

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        codes_name, scales_name, zeros_name, shape_name, bits_name, *nested = self.names(place)[: 5 + len(NESTED)]
        codes = source.entry(codes_name)
        if codes is None or place.experts is not None or len(shape) != 2:
            return None
        source.require(shape_name, codes_name, ("I64",))
        told = tuple(int(length) for length in source.read(shape_name).reshape(-1))
        if told != shape:
            raise ShapeMismatch(shape_name, told, shape)
        source.require(bits_name, codes_name, ("I32",))
        bits, elements = int(source.read(bits_name).reshape(())), math.prod(shape)
        if bits not in READ:
            raise BadTensor(bits_name, f"{bits} bits are not read; read are {', '.join(map(str, READ))}")
        if any(source.entry(name) is not None and source.read(name).any() for name in nested):
            raise BadTensor(codes_name, "scales or zero points that are quantised themselves are not read")
        scales = source.require(scales_name, codes_name, FLOATS)
        zeros = source.require(zeros_name, codes_name, FLOATS)
        groups = math.prod(scales.shape)
        by_rows, by_columns = scales.shape == (groups, 1), scales.shape == (1, groups)
        if not (by_rows or by_columns) or not groups or elements % groups or zeros.shape != scales.shape:
            raise BadTensor(
                scales_name, f"shapes {list(scales.shape)} and {list(zeros.shape)} of scale and zero for {list(shape)}"
            )
        rows, columns = (groups, elements // groups) if by_rows else (elements // groups, groups)
        if codes.nbytes * 8 != elements * bits or rows * bits % 8:
            raise BadTensor(codes_name, f"{codes.nbytes} bytes: not {bits} bits for each of {rows} x {columns}")
        grouping, group = None, elements // groups
        if by_rows and shape[1] % group == 0:
            grouping = Grouping(max(bits, 4), group, offsets=True)
        parts = (
            TensorPart(codes_name, "U8", (rows * bits // 8, columns), codes.nbytes),  # maybe as floats of these bytes
            TensorPart.whole(scales_name, scales),
            TensorPart.whole(zeros_name, zeros),
        )
        return StoredWeight(self.name, shape, parts, grouping)

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        import numpy as np

        packed, scales, zeros = arrays
        values = _unpack(packed, stored.shape).astype(np.float32)
        values -= zeros.astype(np.float32)
        values *= scales.astype(np.float32)
        return values.reshape(stored.shape)

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes | None:
        import numpy as np

        if stored.grouping is None:
            return None
        packed, scales, zeros = arrays
        n = stored.shape[0]
        middle = 2 ** (8 * packed.size // math.prod(stored.shape) - 1)
        codes = _unpack(packed, stored.shape).reshape(stored.shape)
        if (up := MIDDLE[stored.grouping.bits] - middle) > 0:
            codes += np.uint8(up)  # so that offsets are small, and sums with them lose little
        scale = scales.astype(np.float32).reshape(n, -1)
        offsets = scale * (np.float32(middle) - zeros.astype(np.float32).reshape(n, -1))
        return GroupedCodes(stored.grouping, codes, scale, offsets)


def _unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [R, C] → uint8 [R * 8 / bits, C]"""
    import numpy as np

    per_byte = math.prod(shape) // packed.size
    bits = 8 // per_byte
    codes = np.empty((per_byte, *packed.shape), np.uint8)
    for at in range(per_byte):
        np.bitwise_and(packed >> np.uint8(8 - bits * (at + 1)), np.uint8(2**bits - 1), out=codes[at])
    return codes.reshape(-1, packed.shape[1])


HQQ: Final = Hqq("hqq")
