"""compressed-tensors' integers (github.com/vllm-project/compressed-tensors): what llm-compressor and vLLM exchange.

value[n, k] = weight_scale[n, g] * (q[n, k] - weight_zero_point[n, g]), with q from -2**(bits-1) on, and g the group of
input k: k // group, or weight_g_idx[k]. One scale a row ("channel") or a matrix ("tensor") is a group as wide as a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moe_ray.errors import CheckpointError
from moe_ray.model.formats.grouped import MIDDLE, GroupedCodes, Grouping
from moe_ray.model.formats.integers import Columns, Integers, index_of
from moe_ray.model.formats.packing import pack_rows, unpack_rows, words_of
from moe_ray.model.formats.weight_format import (
    BadTensor,
    Place,
    ShapeMismatch,
    Source,
    StoredWeight,
    TensorEntry,
    TensorPart,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

SCALES: Final = ("F16", "BF16", "F32")
INDICES: Final = ("I32", "I64")
SCALE, ZERO, SHAPE, INDEX = "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """`WeightFormat` of "pack-quantized" (codes in int32 words) and "int-quantized" (8 bits, one int8 each)."""

    name: str
    suffix: str
    """Of the tensor of codes."""
    packed: bool

    def names(self, place: Place) -> tuple[str, ...]:
        beside = (SCALE, ZERO, SHAPE, INDEX) if self.packed else (SCALE, ZERO, INDEX)
        activations = ("input_scale", "input_zero_point")  # what the rows would be rounded to, which nothing needs
        return tuple(place.named(suffix) for suffix in (self.suffix, *beside, *activations))

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        name = place.named(self.suffix)
        codes = source.entry(name)
        if codes is None or place.experts is not None:
            return None
        if not self.packed and (codes.dtype != "I8" or source.entry(place.named("SCB")) is not None):
            return None  # SCB: the scales of bitsandbytes
        if self.packed and codes.dtype == "U8":
            return None  # 4-bit floats
        if self.packed and codes.dtype != "I32":
            raise BadTensor(name, f"dtype {codes.dtype}, supported: I32")
        bits = self._bits(name, codes, shape)
        n, k = shape
        scales = self._scales(place, (n, k), source)
        groups = scales.shape[1] if len(scales.shape) == 2 else 1
        parts = [TensorPart.whole(name, codes), TensorPart.whole(place.named(SCALE), scales)]
        if (zeros := source.entry(place.named(ZERO))) is not None:
            self._check_zeros(place, zeros, scales, bits, n)
            parts.append(TensorPart.whole(place.named(ZERO), zeros))
        if self.packed and source.entry(shape_name := place.named(SHAPE)) is not None:
            told = tuple(int(length) for length in source.read(shape_name))
            if told != shape:
                raise ShapeMismatch(shape_name, told, shape)
        index = place.named(INDEX)
        columns = Columns.of(source, index, name, k, groups)
        if columns.reordered:
            parts.append(TensorPart.whole(index, source.require(index, name, INDICES)))
        grouping = None
        if columns.group is not None:
            grouping = Grouping(bits, columns.group, offsets=zeros is not None, reordered=columns.reordered)
        return StoredWeight(self.name, shape, tuple(parts), grouping)

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return self._integers(stored, arrays).values()

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes | None:
        return None if stored.grouping is None else self._integers(stored, arrays).grouped(stored.grouping)

    def _integers(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> Integers:
        import numpy as np

        n, k = stored.shape
        by_suffix = {part.name.rpartition(".")[2]: array for part, array in zip(stored.parts, arrays, strict=True)}
        words = by_suffix[self.suffix]
        if self.packed:
            bits = 4 if words.shape[1] == words_of(k, 4) else 8
            codes = unpack_rows(words, bits, k)
        else:
            bits = 8
            codes = words.view(np.uint8) ^ np.uint8(MIDDLE[8])  # q + 128, q in two's complement
        zeros = by_suffix.get(ZERO)
        if zeros is not None and zeros.dtype == np.int32:
            columns = unpack_rows(zeros.T, bits, n)
            zeros = np.ascontiguousarray(columns.T).astype(np.float32) - np.float32(MIDDLE[bits])
        elif zeros is not None:
            zeros = _per_row(zeros, n)
        return Integers(bits, codes, _per_row(by_suffix[SCALE], n), zeros, by_suffix.get(INDEX))

    def _bits(self, name: str, codes: TensorEntry, shape: tuple[int, ...]) -> int:
        if not self.packed and codes.shape == shape and len(shape) == 2:
            return 8
        if self.packed and len(shape) == 2:
            for bits in (4, 8):
                if codes.shape == (shape[0], words_of(shape[1], bits)):
                    return bits
            raise BadTensor(
                name,
                f"shape {list(codes.shape)}: neither 4 nor 8 bits each for {list(shape)}, which config.json implies",
            )
        raise ShapeMismatch(name, codes.shape, shape)

    def _scales(self, place: Place, shape: tuple[int, int], source: Source) -> TensorEntry:
        name = place.named(SCALE)
        scales = source.require(name, place.named(self.suffix), SCALES)
        n, k = shape
        per_group = len(scales.shape) == 2 and scales.shape[0] == n and k % max(scales.shape[1], 1) == 0
        if scales.shape in ((), (1,), (1, 1), (n,)) or (per_group and scales.shape[1]):
            return scales
        raise BadTensor(
            name, f"shape {list(scales.shape)}: one, or [{n}], or [{n}, groups of equal parts of {k}] expected"
        )

    def _check_zeros(self, place: Place, zeros: TensorEntry, scales: TensorEntry, bits: int, n: int) -> None:
        plain = zeros.dtype == "I8" and zeros.shape == scales.shape
        groups = scales.shape[1] if len(scales.shape) == 2 else 1
        packed = zeros.dtype == "I32" and zeros.shape == (words_of(n, bits), groups)
        if not plain and not (packed and self.packed):
            raise BadTensor(
                place.named(ZERO),
                f"{zeros.dtype} of shape {list(zeros.shape)}, I8 as {place.named(SCALE)} {list(scales.shape)} expected"
                + (f", or I32 of {[words_of(n, bits), groups]}" if self.packed else ""),
            )


def _per_row(values: np.ndarray, n: int) -> np.ndarray:
    """One value, one a row, or one a group of a row: float32 [N, G]."""
    import numpy as np

    if values.size == 1:
        return np.full((n, 1), values.reshape(()), np.float32)
    return values.astype(np.float32).reshape(n, -1)


PACKED: Final = CompressedTensors("pack-quantized", "weight_packed", packed=True)
INT8: Final = CompressedTensors("int-quantized", "weight", packed=False)


def pack_codes(place: Place, weight: GroupedCodes) -> dict[str, torch.Tensor]:
    """The "pack-quantized" tensors of a weight of 4 or 8 bits; `PACKED.codes` gives it back as it is.

    Scales are written in bfloat16, or float16, or float32: the first that holds them without rounding. Raises
    `CheckpointError` where the format cannot say it: for tables of levels, and offsets that are no integer multiples
    of their scales.
    """
    import numpy as np
    import torch

    how = weight.grouping
    if how.levels is not None:
        raise CheckpointError(f"{place.stem}: {PACKED.name} holds integers, not a table of levels")
    n, k = weight.shape
    middle = MIDDLE[how.bits]
    columns, order = weight.codes, weight.order
    if order is not None:
        columns = np.empty_like(weight.codes)
        columns[:, order] = weight.codes
    tensors = {
        place.named("weight_packed"): torch.from_numpy(pack_rows(columns, how.bits)),
        place.named(SCALE): _narrowest(weight.scales),
        place.named(SHAPE): torch.tensor([n, k]),
    }
    if weight.offsets is not None:
        scales = np.where(weight.scales == 0, np.float32(1), weight.scales)
        zeros = np.rint(-weight.offsets / scales)
        if not np.array_equal(-weight.scales * zeros, weight.offsets) or zeros.min() < -middle or zeros.max() >= middle:
            raise CheckpointError(f"{place.stem}: {PACKED.name} holds zero points of {how.bits} bits only")
        packed = pack_rows(np.ascontiguousarray((zeros + middle).astype(np.uint8).T), how.bits)
        tensors[place.named(ZERO)] = torch.from_numpy(np.ascontiguousarray(packed.T))
    if order is not None:
        tensors[place.named(INDEX)] = torch.from_numpy(index_of(order, how.group))
    return tensors


def _narrowest(scales: np.ndarray) -> torch.Tensor:
    import torch

    values = torch.from_numpy(scales)
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(rounded := values.to(dtype), values):
            return rounded
    return values
