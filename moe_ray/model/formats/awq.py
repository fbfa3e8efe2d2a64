"""AWQ's files (Lin et al. 2023, arXiv:2306.00978) in the order of its "gemm" kernel, as AutoAWQ writes them.

value[n, k] = scales[g, n] * (q[k, n] - z[g, n]), g = k // group, 4 bits. Codes and zero points lie along the outputs,
eight in an int32 word: its i-th 4 bits, the lowest first, are output ORDER[i] of the eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.grouped import MIDDLE, GroupedCodes, Grouping
from moe_ray.model.formats.integers import Columns, Integers, expect_shape, is_all
from moe_ray.model.formats.weight_format import Place, ShapeMismatch, Source, StoredWeight, TensorPart

if TYPE_CHECKING:
    import numpy as np

CODES, ZEROS, SCALES = "qweight", "qzeros", "scales"
ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD: Final = 8
MIDDLES: Final = 0x88888888
"""A word of zero points that are all the middle code."""
FLOATS: Final = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Awq:
    """`WeightFormat` of 4-bit codes in this order."""

    name: str

    def names(self, place: Place) -> tuple[str, ...]:
        return tuple(place.named(suffix) for suffix in (CODES, ZEROS, SCALES))

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        codes_name, zeros_name, scales_name = self.names(place)
        codes, told = source.entry(codes_name), source.quantization
        if codes is None or place.experts is not None or len(shape) != 2 or told is None or told.method != "awq":
            return None
        n, k = shape
        source.require(codes_name, codes_name, ("I32",))
        words = -(-n // PER_WORD)
        if codes.shape != (k, words):
            raise ShapeMismatch(codes_name, codes.shape, (k, words))
        scales = source.require(scales_name, codes_name, FLOATS)
        groups = scales.shape[0] if scales.shape else 0
        expect_shape(scales_name, scales, (groups, n), f"{codes_name} {list(codes.shape)}")
        zeros = source.require(zeros_name, codes_name, ("I32",))
        expect_shape(zeros_name, zeros, (groups, words), f"{scales_name} {list(scales.shape)}")
        columns = Columns.of(source, place.named("g_idx"), codes_name, k, groups, told.group)
        assert columns.group is not None
        used = [(codes_name, codes), (scales_name, scales)]
        if offsets := not is_all(source.read(zeros_name).view("<u4"), MIDDLES):
            used.append((zeros_name, zeros))
        grouping = Grouping(4, columns.group, offsets)
        return StoredWeight(self.name, shape, tuple(TensorPart.whole(*one) for one in used), grouping)

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return self._integers(stored, arrays).values()

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes | None:
        return None if stored.grouping is None else self._integers(stored, arrays).grouped(stored.grouping)

    def _integers(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> Integers:
        import numpy as np

        n = stored.shape[0]
        zeros = None
        if len(arrays) == 3:
            zeros = _unpack(arrays[2], n).astype(np.float32) - np.float32(MIDDLE[4])
        scales = np.ascontiguousarray(arrays[1].T).astype(np.float32)
        return Integers(4, _unpack(arrays[0], n), scales, zeros)


def _unpack(words: np.ndarray, n: int) -> np.ndarray:
    """int32 [R, n / 8] → uint8 [n, R]"""
    import numpy as np

    as_bytes = np.ascontiguousarray(words.T).view(np.uint8).reshape(words.shape[1], words.shape[0], 4)
    codes = np.empty((words.shape[1], PER_WORD, words.shape[0]), np.uint8)
    for at, column in enumerate(ORDER):
        np.bitwise_and(as_bytes[:, :, at // 2] >> np.uint8(at % 2 * 4), np.uint8(15), out=codes[:, column])
    return codes.reshape(-1, words.shape[0])[:n]


GEMM: Final = Awq("awq")
