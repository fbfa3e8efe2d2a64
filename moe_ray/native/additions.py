"""What an adapter adds to blocks of packed matrices, as the kernels read it. See low_rank.h."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from moe_ray.native.kernels import Kernels

if TYPE_CHECKING:
    import numpy as np

_RANKS: Final = 16
"""Ranks are filled up to a multiple of this with zeros."""
_PARTS: Final = 3


class Addition(ctypes.Structure):
    """`Addition` of low_rank.h."""

    _fields_ = (("a", c_void_p), ("b", c_void_p), ("column", c_int64 * _PARTS))


class LayerAdapter(ctypes.Structure):
    """`LayerAdapter` of trunk.h."""

    _fields_ = tuple((name, Addition) for name in ("qkv", "out", "gate"))


class ExpertAdapter(ctypes.Structure):
    """`ExpertAdapter` of kernels.cpp."""

    _fields_ = tuple((name, Addition) for name in ("w13", "w2"))


class HeadAdapter(ctypes.Structure):
    """`HeadAdapter` of trunk.h."""

    _fields_ = (("head", Addition),)


class Factors(Protocol):
    """scale * b a, which is added to a matrix [N, K]."""

    @property
    def a(self) -> np.ndarray: ...  # [r, K]
    @property
    def b(self) -> np.ndarray: ...  # [N, r]
    @property
    def scale(self) -> float: ...


@dataclass(frozen=True, slots=True)
class BlockPart:
    """What is added to the outputs of one matrix of a block."""

    factors: Factors | None
    outputs: int


class AdditionPacker:
    """Packs the additions of one adapter; what it has packed lives as long as `memory`."""

    def __init__(self, kernels: Kernels, dtype: str) -> None:
        """`dtype`: in which they are held."""
        import ml_dtypes  # noqa: F401 - tells numpy what bfloat16 is
        import numpy as np

        self._kernels, self._name, self._dtype = kernels, dtype, np.dtype(dtype)
        self.memory: list[np.ndarray] = []

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self.memory)

    def pack(self, parts: Sequence[BlockPart], alternate: bool = False) -> Addition:
        """The addition to a block whose matrices lie one above the other, or alternate by panel; all take one input."""
        import numpy as np

        present = [part.factors for part in parts if part.factors is not None]
        column = [-1] * _PARTS
        if not present:
            return Addition(None, None, (c_int64 * _PARTS)(*column))
        rank = -(-max(len(factors.a) for factors in present) // _RANKS) * _RANKS
        above: list[np.ndarray] = []
        below: list[np.ndarray] = []
        known: dict[int, int] = {}  # gate and up may share what they are multiplied with
        for index, part in enumerate(parts):
            b = np.zeros((part.outputs, rank), dtype=self._dtype)
            if (factors := part.factors) is not None:
                if id(factors.a) not in known:
                    known[id(factors.a)] = rank * len(above)
                    a = np.zeros((rank, factors.a.shape[1]), dtype=self._dtype)
                    a[: len(factors.a)] = factors.a.astype(self._dtype)
                    above.append(a)
                column[index] = known[id(factors.a)]
                b[:, : len(factors.a)] = (factors.b.astype(np.float32) * np.float32(factors.scale)).astype(self._dtype)
            below.append(b)
        addresses = self._pack(np.concatenate(above)), self._pack(*(below if alternate else [np.concatenate(below)]))
        return Addition(*addresses, (c_int64 * _PARTS)(*column))

    def _pack(self, *weights: np.ndarray) -> int:
        address, memory = self._kernels.pack_addition(self._name, *weights)
        self.memory.append(memory)
        return address


def packed_runs(runs: Sequence[tuple[int, int | None, int]]) -> bytes:
    """Runs as the kernels take them: (adapter's id, address of its struct or None, rows)."""
    # Not an array of structures: making one takes as long as some products.
    fields = [field for number, address, count in runs for field in (number, address or 0, count)]
    return struct.pack("QQq" * len(runs), *fields)
