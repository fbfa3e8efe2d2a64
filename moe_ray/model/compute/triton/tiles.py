"""Weights as Triton's kernels read them: tiles of outputs by inputs, each contiguous in memory.

A program of a kernel computes one tile of outputs and goes along the inputs, so each of its loads is one run of 2 to 8
KiB, whatever the format: rows of 4-bit codes would be 32 bytes here and 32 there. Two matrices that share their inputs
(gate and up) lie tile by tile in turns. What does not fill a tile is 0.

Four-bit codes: a byte holds two inputs that are a whole step apart, not neighbours. Then the low halves of a tile's
bytes are one factor of a product and the high halves another, and no code moves between registers.

Floats of 8 bits are held as they are stored. Kernels move their bits to where float16 has its own, which leaves e4m3
2**8 times too small, for its exponents count from 7 and float16's from 15: scales make up for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from moe_ray.model.formats.grouped import MIDDLE, Float8, Grouping

TILE: Final = 64
"""Outputs of a program: what one tensor-core instruction of Hopper takes, and four of Ampere."""
NARROW_TILE: Final = 16
"""For matrices of few outputs, such as those of adapters: the least that tensor cores take."""
MANTISSA: Final[dict[Float8, int]] = {"e4m3": 3, "e5m2": 2}
"""Bits of it."""
WIDENED: Final[dict[Float8, float]] = {"e4m3": 2.0**8, "e5m2": 1.0}
"""A float of 8 bits as a multiple of the float16 that its bits give."""
LARGEST: Final = 2.0**14
"""Of a scale in memory: float16's largest power of two but one. What is smaller keeps 11 bits down to 2**-14."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How `count` matrices [n, k] lie in memory, in turns. Plain values."""

    n: int
    k: int
    count: int = 1
    dtype: torch.dtype = torch.float32
    """Of rows, and of weights where they are floats."""
    grouping: Grouping | None = None

    @property
    def tile(self) -> int:
        return TILE if self.n > NARROW_TILE else NARROW_TILE

    @property
    def bits(self) -> int:
        """Of a weight's code, or of a float."""
        return 8 * self.dtype.itemsize if self.grouping is None else self.grouping.bits

    @property
    def groups(self) -> int:
        return 0 if self.grouping is None else self.k // self.grouping.group

    @property
    def step(self) -> int:
        """Inputs of one product: of one group of a scale. 128 bytes of 16-bit or 32-bit floats at most."""
        if self.grouping is None:
            return 256 // max(4, 2 * self.dtype.itemsize)
        return 64 if self.groups == 1 or self.grouping.group % 64 == 0 else 32

    @property
    def halves(self) -> int:
        """Products of one tile of memory."""
        return 2 if self.bits == 4 else 1

    @property
    def row_tiles(self) -> int:
        """Of one matrix."""
        return -(-self.n // self.tile)

    @property
    def blocks(self) -> int:
        """Tiles of memory along the inputs."""
        return -(-self.k // (self.step * self.halves))


@dataclass(frozen=True, slots=True, eq=False)
class TiledWeight:
    """`Tiling` with its tensors; R tiles of outputs of all matrices, B blocks of inputs, G groups."""

    how: Tiling
    codes: torch.Tensor  # [R, B, tile, step] of floats, int8 (code - 128), or uint8: float8, or two codes of 4 bits
    scales: torch.Tensor | None = None  # float16 [R, G, tile], parts of `multiplier`; of float8 float32, times WIDENED
    offsets: torch.Tensor | None = None  # float16 [R, G, tile], parts of `multiplier`
    multiplier: torch.Tensor | None = None  # float32 [count]: powers of two
    order: torch.Tensor | None = None  # int32 [k]: the input of each column
    levels: torch.Tensor | None = None  # [16] in the dtype of rows

    @staticmethod
    def blank(how: Tiling, device: torch.device | str = "cpu") -> TiledWeight:
        """Memory for such weights, not initialised."""
        tiles = (how.row_tiles * how.count, how.blocks, how.tile, how.step)
        grouping = how.grouping
        if grouping is None:
            return TiledWeight(how, torch.empty(tiles, dtype=how.dtype, device=device))
        of_groups = (tiles[0], how.groups, how.tile)

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return TiledWeight(
            how,
            empty(tiles, torch.int8 if grouping.bits == 8 and grouping.float8 is None else torch.uint8),
            empty(of_groups, torch.float16 if grouping.float8 is None else torch.float32),
            empty(of_groups, torch.float16) if grouping.offsets else None,
            empty((how.count,), torch.float32) if grouping.float8 is None else None,
            empty((how.k,), torch.int32) if grouping.reordered else None,
            torch.tensor(grouping.levels, dtype=how.dtype, device=device) if grouping.levels else None,
        )

    def over(self, tensors: Iterator[torch.Tensor]) -> TiledWeight:
        """Weights of this tiling in other memory: the next of `tensors`, in the order of its own."""
        parts = (self.codes, self.scales, self.offsets, self.multiplier, self.order)
        codes, scales, offsets, multiplier, order = (None if each is None else next(tensors) for each in parts)
        assert codes is not None, "every weight has codes"
        return TiledWeight(self.how, codes, scales, offsets, multiplier, order, self.levels)

    def tensors(self) -> list[torch.Tensor]:
        """All that a checkpoint has a say in, in a fixed order."""
        found = (self.codes, self.scales, self.offsets, self.multiplier, self.order)
        return [tensor for tensor in found if tensor is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self, device: torch.device) -> TiledWeight:
        """The same on another device."""
        moved = [
            None if each is None else each.to(device)
            for each in (self.codes, self.scales, self.offsets, self.multiplier, self.order, self.levels)
        ]
        assert moved[0] is not None
        return TiledWeight(self.how, moved[0], *moved[1:])


@dataclass(frozen=True, slots=True, eq=False)
class CodeTensors:
    """A quantised weight, as `GroupedCodes` says, by torch."""

    codes: torch.Tensor  # uint8 [N, K]
    scales: torch.Tensor  # float32 [N, G]
    offsets: torch.Tensor | None = None  # float32 [N, G]
    order: torch.Tensor | None = None  # int32 [K]


def tiled_floats(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> TiledWeight:
    """Matrices [n, k] of floats, on their device, in turns."""
    n, k = matrices[0].shape
    weight = TiledWeight.blank(Tiling(n, k, len(matrices), dtype), matrices[0].device)
    for index, matrix in enumerate(matrices):
        weight.codes[index :: len(matrices)] = _tiles(matrix.to(dtype), weight.how)
    return weight


def tiled_codes(matrices: Sequence[CodeTensors], grouping: Grouping, dtype: torch.dtype) -> TiledWeight:
    """Matrices [n, k] of codes of one grouping and order, on their device, in turns. `dtype`: of rows."""
    n, k = matrices[0].codes.shape
    how = Tiling(n, k, len(matrices), dtype, grouping)
    weight = TiledWeight.blank(how, matrices[0].codes.device)
    assert weight.scales is not None
    for index, matrix in enumerate(matrices):
        part = slice(index, None, len(matrices))
        weight.codes[part] = _tiles(_bytes_of_codes(matrix.codes, how), how)
        if grouping.float8 is not None:
            weight.scales[part] = _of_groups(matrix.scales * WIDENED[grouping.float8], how)
            continue
        assert weight.multiplier is not None
        parts = [matrix.scales] if matrix.offsets is None else [matrix.scales, matrix.offsets]
        largest = torch.stack([each.abs().amax() for each in parts]).amax().double()
        # Of a weight that is 0 throughout, any.
        step = torch.exp2(torch.ceil(torch.log2(largest / LARGEST))).where(largest > 0, torch.ones_like(largest))
        weight.multiplier[index] = step
        weight.scales[part] = _of_groups(matrix.scales / step, how)
        if weight.offsets is not None and matrix.offsets is not None:
            weight.offsets[part] = _of_groups(matrix.offsets / step, how)
    if weight.order is not None and matrices[0].order is not None:
        weight.order.copy_(matrices[0].order)
    return weight


def _bytes_of_codes(codes: torch.Tensor, how: Tiling) -> torch.Tensor:
    """uint8 codes [n, k] as bytes [n, B * step]."""
    if how.grouping is not None and how.grouping.float8 is not None:
        return codes
    if how.bits == 8:
        return (codes.to(torch.int16) - MIDDLE[8]).to(torch.int8)
    width = how.blocks * how.halves * how.step
    whole = torch.nn.functional.pad(codes, (0, width - how.k))
    low, high = whole.view(how.n, how.blocks, 2, how.step).unbind(2)
    return (low | high << 4).reshape(how.n, -1)


def _tiles(matrix: torch.Tensor, how: Tiling) -> torch.Tensor:
    """[n, up to B * step] as [n / tile, B, tile, step]."""
    rows, columns = how.row_tiles * how.tile, how.blocks * how.step
    whole = torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - how.n))
    return whole.view(how.row_tiles, how.tile, how.blocks, how.step).transpose(1, 2)


def _of_groups(values: torch.Tensor, how: Tiling) -> torch.Tensor:
    """[n, G] as [n / tile, G, tile]."""
    whole = torch.nn.functional.pad(values, (0, 0, 0, how.row_tiles * how.tile - how.n))
    return whole.view(how.row_tiles, how.tile, how.groups).transpose(1, 2)
