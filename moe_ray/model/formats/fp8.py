"""8-bit floats with a scale for a whole weight, each row, or each block (DeepSeek-V3, arXiv:2412.19437, section 3.3).

value[n, k] = weight[n, k] * scale[n // rows, k // columns]. The scale is called weight_scale (compressed-tensors,
AutoFP8, ModelOpt, FBGEMM) or weight_scale_inv (DeepSeek, transformers); both multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.grouped import Float8, GroupedCodes, Grouping, float8_values
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

STORED: Final[dict[str, Float8]] = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
SCALES: Final = ("F32", "BF16", "F16", "F8_E8M0")
SCALE_NAMES: Final = ("weight_scale_inv", "weight_scale")
STACKED_SCALE_NAMES: Final = ("scale_inv", "scale", "weight_scale")
ACTIVATIONS: Final = ("input_scale", "activation_scale", "input_scale_ub")
"""What rows would be rounded to: nothing needs them."""


@dataclass(frozen=True, slots=True)
class Fp8:
    """`WeightFormat` of float8 weights. They have codes where blocks divide the inputs."""

    name: str

    def names(self, place: Place) -> tuple[str, ...]:
        return tuple(place.named(suffix) for suffix in ("weight", *self._scale_names(place), *ACTIVATIONS))

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        name = place.named("weight")
        weight = source.entry(name)
        if weight is None or weight.dtype not in STORED:
            return None
        if weight.shape != place.whole(shape) or len(shape) != 2:
            raise ShapeMismatch(name, weight.shape, place.whole(shape))
        scale_names = [place.named(suffix) for suffix in self._scale_names(place)]
        scale_name = next((name for name in scale_names if source.entry(name) is not None), None)
        if scale_name is None:
            raise BadTensor(name, f"none of {', '.join(scale_names)} beside it")
        scale = source.require(scale_name, name, SCALES)
        block = source.quantization.block if source.quantization is not None else None
        scale_part, block = _scale_part(place, (shape[0], shape[1]), scale_name, scale, block)
        nbytes = shape[0] * shape[1]
        weight_part = TensorPart(name, weight.dtype, shape, nbytes, offset=place.index * nbytes)
        group, kind = min(block[1], shape[1]), STORED[weight.dtype]
        grouping = Grouping(8, group, float8=kind) if shape[1] % group == 0 else None
        return StoredWeight(self.name, shape, (weight_part, scale_part), grouping, block)

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        import numpy as np

        weight, scale = arrays
        values = float8_values(STORED[stored.parts[0].dtype])[weight.view(np.uint8)]
        assert stored.block is not None
        high, wide = stored.block
        # The last blocks may be smaller.
        for row, scales in enumerate(scale.astype(np.float32)):
            values[row * high : (row + 1) * high] *= scales.repeat(wide)[: stored.shape[1]]
        return values

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes | None:
        """Its bits, a scale for each group of each row. Raises `BadTensor` for what is no finite number."""
        import numpy as np

        how, (weight, scale) = stored.grouping, arrays
        if how is None:
            return None
        assert how.float8 is not None
        assert stored.block is not None
        codes = weight.view(np.uint8)
        if not np.isfinite(float8_values(how.float8))[codes].all():
            raise BadTensor(stored.parts[0].name, "not all of its weights are finite numbers")
        of_rows = scale.astype(np.float32)[np.arange(stored.shape[0]) // stored.block[0]]
        return GroupedCodes(how, codes, of_rows)

    def _scale_names(self, place: Place) -> tuple[str, ...]:
        return SCALE_NAMES if place.experts is None else STACKED_SCALE_NAMES


def _scale_part(
    place: Place, shape: tuple[int, int], name: str, entry: TensorEntry, told: tuple[int, int] | None
) -> tuple[TensorPart, tuple[int, int]]:
    """The scales of one weight, [rows, columns] of blocks, and a block's size. Raises `BadTensor`."""
    experts, (n, k) = place.experts, shape
    height = n * place.parts
    grid = entry.shape if experts is None else entry.shape[1:]
    if experts is not None and entry.shape[:1] != (experts,):
        raise ShapeMismatch(name, entry.shape, (experts, *grid))
    if all(length == 1 for length in grid):
        rows, columns, block = 1, 1, (height, k)
    elif grid in ((height,), (height, 1)):
        rows, columns, block = height, 1, (1, k)
    elif len(grid) == 2:
        rows, columns = grid
        block = told or _equal_blocks(name, (height, k), (rows, columns))
        if (rows, columns) != (-(-height // block[0]), -(-k // block[1])):
            raise BadTensor(name, f"shape {list(entry.shape)}: not one for each {list(block)} of {[height, k]}")
    else:
        raise BadTensor(name, f"shape {list(entry.shape)}: one, {height}, or blocks of {[height, k]} expected")
    item = entry.nbytes // (rows * columns * (experts or 1))
    expert, part = divmod(place.index, place.parts)
    if rows == 1:
        return TensorPart(name, entry.dtype, (1, columns), columns * item, expert * columns * item), block
    if place.parts > 1 and n % block[0]:
        raise BadTensor(name, f"blocks of {block[0]} rows lie in two weights of {n} rows")
    mine = -(-n // block[0])
    first = expert * rows + part * mine
    return TensorPart(name, entry.dtype, (mine, columns), mine * columns * item, first * columns * item), block


def _equal_blocks(name: str, shape: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    if not all(grid) or shape[0] % grid[0] or shape[1] % grid[1]:
        raise BadTensor(name, f"shape {list(grid)}: {list(shape)} has no such equal blocks, and no config names others")
    return shape[0] // grid[0], shape[1] // grid[1]


FP8: Final = Fp8("fp8")
