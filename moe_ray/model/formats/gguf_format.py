"""Weights in ggml's blocks, as GGUF files hold them: one tensor each, every row a run of blocks.

The layouts of the blocks are those of ggml (github.com/ggml-org/llama.cpp: ggml-common.h, dequantize_row_* in
ggml-quants.c).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.grouped import GroupedCodes, Grouping
from moe_ray.model.formats.weight_format import Place, Source, StoredWeight, TensorPart, sole_tensor

if TYPE_CHECKING:
    import numpy as np

SUFFIX: Final = "weight"
KERNEL_GROUP: Final = 32
"""Kernels compute on groups of a multiple of it."""
CHUNK_WEIGHTS: Final = 1 << 20
"""How many are decoded at a time, so that what lies between bytes and floats stays in the cache's reach."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What B blocks hold: value = scale * level(code) + offset, as in `GroupedCodes`."""

    codes: np.ndarray
    """uint8 [B, elements]"""
    scales: np.ndarray
    """float32 [B, groups]"""
    offsets: np.ndarray | None = None
    """float32 [B, groups]"""


@dataclass(frozen=True, slots=True)
class GgufFormat:
    """`WeightFormat` of one of ggml's block types."""

    stored: str
    """ggml's name of it."""
    elements: int
    """Of a block."""
    block_bytes: int
    how: Grouping
    unpack: Callable[[np.ndarray], Unpacked]
    """Of blocks, uint8 [B, block_bytes]."""

    @property
    def name(self) -> str:
        return f"gguf_{self.stored.lower()}"

    def names(self, place: Place) -> tuple[str, ...]:
        return (place.named(SUFFIX),)

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        (name,) = self.names(place)
        if not sole_tensor(name, self.stored, place.whole(shape), source):
            return None
        nbytes = self.nbytes(shape)
        rows = math.prod(shape[:-1])
        part = TensorPart(name, "U8", (rows, nbytes // rows), nbytes, offset=place.index * nbytes)
        return StoredWeight(self.name, shape, (part,), self.how if self._for_kernels else None)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.elements * self.block_bytes

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        import numpy as np

        (rows,) = arrays
        columns = stored.shape[-1]
        values = np.empty((len(rows), columns), np.float32)
        step = max(1, CHUNK_WEIGHTS // columns)
        for start in range(0, len(rows), step):
            values[start : start + step] = self._codes(rows[start : start + step]).values()
        return values.reshape(stored.shape)

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes | None:
        (rows,) = arrays
        return self._codes(rows) if self._for_kernels else None

    @property
    def _for_kernels(self) -> bool:
        return self.how.group % KERNEL_GROUP == 0

    def _codes(self, rows: np.ndarray) -> GroupedCodes:
        """Of rows of blocks, uint8 [N, bytes]."""
        found = self.unpack(rows.reshape(-1, self.block_bytes))
        n = len(rows)
        offsets = None if found.offsets is None else found.offsets.reshape(n, -1)
        return GroupedCodes(self.how, found.codes.reshape(n, -1), found.scales.reshape(n, -1), offsets)


def halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, as float32 [B, 1]."""
    import numpy as np

    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., n] bytes → [..., 2 n] values of 4 bits: the low ones of all bytes, then the high ones."""
    import numpy as np

    return np.concatenate([packed & 0xF, packed >> 4], axis=-1)
