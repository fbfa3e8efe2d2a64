"""GPTQ's files (Frantar et al. 2022, arXiv:2210.17323), as AutoGPTQ and GPTQModel write them.

value[n, k] = scales[g, n] * (q[k, n] - z[g, n]), g = g_idx[k]. Codes q lie along the inputs in int32 words, zero points
z along the outputs. The first version stores z - 1 (modulo 2**bits), "gptq_v2" stores z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.grouped import MIDDLE, GroupedCodes, Grouping
from moe_ray.model.formats.integers import Columns, Integers, expect_shape, is_all
from moe_ray.model.formats.packing import unpack_rows, words_of
from moe_ray.model.formats.weight_format import BadTensor, Place, Source, StoredWeight, TensorPart

if TYPE_CHECKING:
    import numpy as np

CODES, ZEROS, SCALES, INDEX = "qweight", "qzeros", "scales", "g_idx"
BITS: Final = (4, 8, 3, 2)
FLOATS: Final = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Gptq:
    """`WeightFormat` of one version."""

    name: str
    added: int
    """To a stored zero point."""

    def names(self, place: Place) -> tuple[str, ...]:
        return tuple(place.named(suffix) for suffix in (CODES, ZEROS, SCALES, INDEX))

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        codes_name, zeros_name, scales_name, index_name = self.names(place)
        codes, told = source.entry(codes_name), source.quantization
        if codes is None or place.experts is not None or len(shape) != 2:
            return None
        if told is None or told.method not in ("gptq", "awq"):
            raise BadTensor(codes_name, "of GPTQ or AWQ: neither config.json nor quantize_config.json says of which")
        if told.method != "gptq" or told.zeros_plus_one != bool(self.added):
            return None
        n, k = shape
        source.require(codes_name, codes_name, ("I32",))
        bits = next((bits for bits in BITS if codes.shape == (words_of(k, bits), n)), None)
        if bits is None:
            raise BadTensor(
                codes_name,
                f"shape {list(codes.shape)}: not 2, 3, 4 or 8 bits each for {[n, k]} of config.json",
            )
        scales = source.require(scales_name, codes_name, FLOATS)
        groups = scales.shape[0] if scales.shape else 0
        expect_shape(scales_name, scales, (groups, n), f"{codes_name} {list(codes.shape)}")
        zeros = source.require(zeros_name, codes_name, ("I32",))
        expect_shape(zeros_name, zeros, (groups, words_of(n, bits)), f"{scales_name} {list(scales.shape)}")
        columns = Columns.of(source, index_name, codes_name, k, groups, told.group)
        used = [(codes_name, codes), (scales_name, scales)]
        if not self._is_symmetric(source.read(zeros_name), bits, n):
            used.append((zeros_name, zeros))
        if columns.reordered:
            used.append((index_name, source.require(index_name, codes_name, ("I32", "I64"))))
        grouping = None
        if columns.group is not None:
            offsets = len(used) > 2 and used[2][0] == zeros_name
            grouping = Grouping(max(bits, 4), columns.group, offsets, reordered=columns.reordered)
        return StoredWeight(self.name, shape, tuple(TensorPart.whole(*one) for one in used), grouping)

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return self._integers(stored, arrays).values()

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes | None:
        return None if stored.grouping is None else self._integers(stored, arrays).grouped(stored.grouping)

    def _is_symmetric(self, words: np.ndarray, bits: int, n: int) -> bool:
        """Whether all zero points are the middle code: they need not be kept."""
        if bits != 3:  # the common ones without unpacking: a word of equal codes
            middle = (2 ** (bits - 1) - self.added) % 2**bits
            word = sum(middle << at for at in range(0, 32, bits))
            return n * bits % 32 == 0 and is_all(words.view("<u4"), word)
        return is_all(self._zeros(words, bits, n), 2 ** (bits - 1))

    def _zeros(self, words: np.ndarray, bits: int, n: int) -> np.ndarray:
        """uint8 [G, N]"""
        import numpy as np

        return (unpack_rows(words, bits, n) + np.uint8(self.added)) & np.uint8(2**bits - 1)

    def _integers(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> Integers:
        import numpy as np

        n, k = stored.shape
        by_suffix = {part.name.rpartition(".")[2]: array for part, array in zip(stored.parts, arrays, strict=True)}
        words = by_suffix[CODES]
        bits = next(bits for bits in BITS if words.shape == (words_of(k, bits), n))
        width = max(bits, 4)
        codes = unpack_rows(words.T, bits, k)
        zeros = None
        if ZEROS in by_suffix:
            stored_zeros = self._zeros(by_suffix[ZEROS], bits, n)
            zeros = np.ascontiguousarray(stored_zeros.T).astype(np.float32) - np.float32(MIDDLE[width])
        elif bits < width:
            codes = codes + np.uint8(MIDDLE[width] - 2 ** (bits - 1))
        scales = np.ascontiguousarray(by_suffix[SCALES].T).astype(np.float32)
        return Integers(width, codes, scales, zeros, by_suffix.get(INDEX))


V1: Final = Gptq("gptq", added=1)
V2: Final = Gptq("gptq_v2", added=0)
