"""MXFP4 (Open Compute Project, Microscaling Formats v1.0): 4-bit floats, a power of two for each 32 of them.

value[n, k] = E2M1[code[n, k]] * 2 ** (scale[n, k // 32] - 127), two codes a byte, the first in its lower half. A
stack of experts has `_blocks` uint8 [E, R, K / 32, 16] and `_scales` uint8 [E, R, K / 32], as gpt-oss; a weight of its
own has `weight_packed` [N, K / 2] and `weight_scale` [N, K / 32], as compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.grouped import GroupedCodes, Grouping
from moe_ray.model.formats.weight_format import BadTensor, Place, ShapeMismatch, Source, StoredWeight

if TYPE_CHECKING:
    import numpy as np

GROUP: Final = 32
BIAS: Final = 127
E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENTS: Final = ("U8", "F8_E8M0")
NOT_A_NUMBER: Final = 255
GROUPING: Final = Grouping(4, GROUP, levels=E2M1)
OWN: Final = (("weight_packed", "weight_scale"), ("weight_blocks", "weight_scales"))
"""(codes, scales) of a weight of its own."""
STACKED: Final = ("blocks", "scales")


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """`WeightFormat` of these."""

    name: str

    def names(self, place: Place) -> tuple[str, ...]:
        if place.experts is not None:
            return tuple(place.named(suffix) for suffix in STACKED)
        return tuple(place.named(suffix) for pair in OWN for suffix in pair)

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        for codes_suffix, scales_suffix in OWN if place.experts is None else (STACKED,):
            codes_name, scales_name = place.named(codes_suffix), place.named(scales_suffix)
            codes = source.entry(codes_name)
            if codes is not None and codes.dtype == "U8":
                break
        else:
            return None
        if len(shape) != 2 or shape[1] % GROUP:
            raise BadTensor(codes_name, f"{list(shape)}, as config.json implies, is not made of groups of {GROUP}")
        n, k = shape
        groups = k // GROUP
        place = replace(place, transposed=False)
        flat, blocks = place.whole((n, k // 2)), place.whole((n, groups, GROUP // 2))
        if codes.shape not in (flat, blocks):
            raise ShapeMismatch(codes_name, codes.shape, blocks)
        scales = source.require(scales_name, codes_name, EXPONENTS)
        if scales.shape != place.whole((n, groups)):
            raise ShapeMismatch(scales_name, scales.shape, place.whole((n, groups)))
        parts = (
            place.tensor_part(codes_name, codes.dtype, (n, k // 2), n * k // 2),
            place.tensor_part(scales_name, "U8", (n, groups), n * groups),
        )
        return StoredWeight(self.name, shape, parts, GROUPING)

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return self.codes(stored, arrays).values()

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes:
        import numpy as np

        packed, exponents = arrays
        codes = np.empty((*packed.shape, 2), np.uint8)
        np.bitwise_and(packed, 15, out=codes[:, :, 0])
        np.right_shift(packed, 4, out=codes[:, :, 1])
        scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - BIAS)
        scales[exponents == NOT_A_NUMBER] = np.nan
        assert stored.grouping is not None
        return GroupedCodes(stored.grouping, codes.reshape(stored.shape), scales)


MXFP4: Final = Mxfp4("mxfp4")
