"""What an expert computes beside its products with weights, as the kernels read it. See gating.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_void_p
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np

PANEL: Final = 16
"""Outputs that lie side by side and are stored together, of gate and of up, too: `kPanel` of matrix.h."""


class GatingTerms(ctypes.Structure):
    """`Gating` of gating.h."""

    _fields_ = (*((name, c_void_p) for name in ("bias13", "bias2")), *((name, c_float) for name in ("limit", "alpha")))


@dataclass(frozen=True, slots=True, eq=False)
class Gating:
    """Biases of one expert, and how its gate and up are combined; without arguments SwiGLU without biases."""

    biases: tuple[np.ndarray, ...] = ()
    """float32 [2 I], gate and up in turns of `PANEL`, and [D]; (): there are none."""
    limit: float = 0.0
    """Of clamped SwiGLU; 0: it is plain."""
    alpha: float = 0.0
    terms: GatingTerms = field(init=False)

    def __post_init__(self) -> None:
        addresses = tuple(bias.ctypes.data for bias in self.biases) or (None, None)
        object.__setattr__(self, "terms", GatingTerms(*addresses, self.limit, self.alpha))

    @staticmethod
    def of(biases: Sequence[np.ndarray], limit: float = 0.0, alpha: float = 0.0) -> Gating:
        """Of biases of gate [I], up [I] and down [D], I a multiple of 16, in any float dtype; or of none."""
        import numpy as np

        if not biases:
            return Gating((), limit, alpha)
        gate, up, down = (bias.astype(np.float32) for bias in biases)
        turns = np.stack((gate.reshape(-1, PANEL), up.reshape(-1, PANEL)), axis=1)
        return Gating((turns.reshape(-1), down), limit, alpha)

    @property
    def address(self) -> int:
        """For the kernels, while this object lives."""
        return ctypes.addressof(self.terms)

    @property
    def nbytes(self) -> int:
        """Bytes of biases in memory."""
        return sum(bias.nbytes for bias in self.biases)

    def buffers(self) -> list[memoryview]:
        """The bytes of the biases, to read or to fill."""
        return [bias.data.cast("B") for bias in self.biases]
